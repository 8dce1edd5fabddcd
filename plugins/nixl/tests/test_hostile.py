"""A slice of the hostile run over NIXL; the long one is `python -m tensorway.testing.hostile nixl --keep-opaque`.

NIXL's own metadata is left as it is: some that is damaged crashes the process that loads it (ai-dynamo/nixl#1986), and
who may send any is the rendezvous' business.
"""

from __future__ import annotations

import random

import pytest

from tensorway.errors import TensorwayError
from tensorway.testing import hostile
from tensorway_nixl import wire

CASES = 300


@pytest.mark.parametrize("options", ["{}", '{"ucx_tls": ["tcp"]}'], ids=["cma", "tcp"])
def test_descriptions_that_are_not_true_hurt_nobody(real_nixl, options, capfd):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    command = ["nixl", "--kinds", "descriptions", "--keep-opaque", "--kept-files", "30", "--options", options]

    assert 0 == hostile.main([*command, "--cases", str(CASES), "--seed", str(seed)]), capfd.readouterr().out
    assert f"descriptions: {CASES} cases of seed {seed}" in capfd.readouterr().out


def test_notifications_that_are_none_are_passed_over():
    from tensorway.testing.strangers import fuzzed

    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng, true = random.Random(seed), wire.frame("somebody", b"a payload of some bytes")
    for _ in range(5000):
        message = true[:4] + fuzzed(rng, true[4:])
        try:
            note = wire.unframe("0" * 32, message)
        except TensorwayError as error:
            pytest.fail(f"{message!r} raised {error!r}")
        assert note is None or isinstance(note.payload, bytes)
