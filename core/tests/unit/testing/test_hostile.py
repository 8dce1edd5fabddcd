"""A slice of the hostile run; the long one is `python -m tensorway.testing.hostile local`."""

from __future__ import annotations

import random

import msgspec
import pytest

from tensorway.errors import DescriptionInvalid
from tensorway.testing import hostile, rig, strangers
from tensorway.testing.hostile import KINDS, Hostile
from tensorway.testing.mutations import damaged, opaque, redigested, reworded
from tensorway.transport import Endpoint, description, sockets
from tensorway.transport.local import LocalFabric


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_bytes_hurt_nobody(kind, capfd):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    assert 0 == hostile.main(["local", "--kinds", kind, "--cases", "200", "--seed", str(seed)]), capfd.readouterr()
    assert f"{kind}: 200 cases of seed {seed}" in capfd.readouterr().out


def test_an_error_that_is_not_ours_is_a_breach_with_its_case(monkeypatch):
    decode = description.decode

    def careless(data, transport):
        try:
            return decode(data, transport)
        except DescriptionInvalid:
            raise KeyError(transport) from None

    monkeypatch.setattr(description, "decode", careless)
    breaches = Hostile("local", cases=10, seed=3, kinds=("descriptions",)).run()
    assert any("descriptions case" in text and "of seed 3 raised KeyError" in text for text in breaches)


def test_a_crash_is_told_with_its_case(capfd, monkeypatch, tmp_path):
    crashing = "import os, signal; from tensorway.testing import strangers, hostile\n"
    crashing += "def crash(*_): os.kill(os.getpid(), signal.SIGSEGV)\n"
    crashing += "strangers.NOTES['local'] = crash\n"
    (tmp_path / "sitecustomize.py").write_text(crashing)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert 1 == hostile.main(["local", "--kinds", "notes", "--cases", "3", "--seed", "9"])
    assert "CRASHED with signal 11 at notes 0 of seed 9" in capfd.readouterr().out


def test_a_leak_is_found(monkeypatch):
    kept = []

    def forgetful(self, link):
        kept.append(link)

    monkeypatch.setattr(LocalFabric, "disconnect", forgetful)
    monkeypatch.setattr(rig, "SLACK", 1.0)
    try:
        breaches = Hostile("local", cases=400, seed=1, kinds=("descriptions",)).run()
    finally:
        for link in kept:
            sockets.close(link.channel)
    assert any("files" in text for text in breaches)


def test_what_within_a_message_is_no_message_is_damaged_and_no_error_of_the_tool():
    key_that_cannot_be_one = b"\x81\xc7\x01\x05x\x01"
    message = msgspec.msgpack.encode([key_that_cannot_be_one])
    assert all(reworded(random.Random(seed), message) for seed in range(50))


@pytest.fixture
def described():
    with Endpoint(LocalFabric(), "somebody") as endpoint, endpoint.register(bytearray(4096)):
        yield endpoint.describe()


def test_a_redigested_description_is_refused_for_what_it_says(described):
    rng, reasons = random.Random(1), set()
    for _ in range(300):
        data = redigested(rng, described)
        assert data != described
        try:
            description.decode(data, "local")
        except DescriptionInvalid as error:
            reasons.add(error.true.split(":")[0])
    assert "It cannot be read" in reasons
    assert "It is damaged" not in reasons


def test_what_is_to_be_kept_is_kept():
    blob = msgspec.msgpack.encode([1, "version", b"what a library reads"])
    wire = description.Description("nixl", "name", "0" * 32, (), blob)
    data, rng = description.encode(wire), random.Random(1)
    assert b"what a library reads" == opaque(data)
    assert all(b"what a library reads" in redigested(rng, data, b"what a library reads") for _ in range(200))
    assert not all(b"what a library reads" in redigested(rng, data) for _ in range(200))


def test_mutations_come_from_the_seed(described):
    for make in (damaged, redigested, lambda rng, data: reworded(rng, data[20:])):
        assert make(random.Random(5), described) == make(random.Random(5), described)


def test_a_stranger_knows_how_to_knock():
    assert {"local", "mooncake"} <= set(strangers.NOTES)
