from __future__ import annotations

import errno
import io
import json
import os
import random

import pytest

from tensorway.cli.output import Output
from tensorway.errors import OptionsInvalid
from tensorway.offload import key_tenant
from tensorway_fs import command
from tensorway_fs.command.removing import Which, remove
from tensorway_fs.command.verifying import verify_all
from tensorway_fs.disk import Disk
from tensorway_fs.namespace import FACTS, Root
from tensorway_fs.records import PAGE, Head
from tensorway_fs.testing.blocks import DEADLINE, key_of, read

MANY = range(0, 8 * 300, 8)
OTHER = [number for number in MANY if not number % 3]


@pytest.fixture
def said(tmp_path):
    """Run a command on the test's folder; its exit code, and what it said."""

    def run(action, *words, as_json=True):
        out = Output(as_json, stream=io.StringIO(), notes=io.StringIO())
        code = getattr(command, action)([str(tmp_path), *words], out)
        text = out.stream.getvalue()
        return code, json.loads(text) if as_json else text

    return run


def test_segments_are_listed_and_counted(open_tier, put, said, segments):
    tier = open_tier()
    put(tier, MANY)
    code, listed = said("ls")
    assert 0 == code and "tensorway.offload-ls/1" == listed["schema"]
    assert [path.name for path in segments()] == [row["file"] for row in listed["segments"]]
    assert ["sealed", "written"] == sorted({row["state"] for row in listed["segments"]})
    assert len(MANY) == sum(row["blocks"] for row in listed["segments"])
    tier.close()
    code, counted = said("stat")
    (space,) = counted["spaces"]
    assert {"model": "campaign"} == space["facts"]
    assert len(MANY) == space["blocks"] and 0 == space["damaged"]
    assert {len(OTHER), len(MANY) - len(OTHER)} == set(space["tenants"].values()) and "none" in space["tenants"]
    for action in ("ls", "stat", "verify"):
        code, text = said(action, as_json=False)
        assert (0 == code and "300" in text.replace(",", "")) or action == "ls"


def test_what_strangers_wrote_there_is_not_obeyed_by_a_terminal(open_tier, put, said, segments):
    put(open_tier(), MANY[:3])
    facts = segments()[0].parent / FACTS
    facts.write_text(json.dumps({"facts": {"model\x1b[8m": "\x1b]0;owned\x07\n9 fingerprints, forged"}}))
    code, text = said("stat", as_json=False)
    assert 0 == code and "model\\x1b[8m: \\x1b]0;owned\\x07 9 fingerprints, forged" in text
    assert not set(text) & {"\x1b", "\x07"} and "1 fingerprints" in text.splitlines()[-1]


def test_what_is_damaged_is_found_and_repaired(open_tier, put, said, segments):
    tier = open_tier()
    put(tier, MANY)
    assert (0, len(MANY)) == (said("verify")[0], said("verify")[1]["sound"])
    rng = random.Random(1)
    for path in segments()[-3:-1]:
        head = Head.decoded(path.read_bytes()[:PAGE])
        with path.open("r+b") as file:
            file.seek(head.at(rng.randrange(head.places)) + 7)
            file.write(b"\xa5\x5a")
    segments()[0].write_bytes(b"nothing")
    code, found = said("verify")
    assert 1 == code and (2, 1) == (found["damaged"], found["files"]) and 3 == len(found["problems"])
    assert 1 == said("verify", "--repair")[0]
    assert 0 == said("verify")[1]["damaged"]
    outcomes = read(tier, MANY)
    assert "corrupt" not in set(outcomes.values())
    assert (0, 1) == (said("gc", "--damaged")[0], said("gc", "--damaged")[1]["segments"] + 1)
    assert 0 == said("verify")[0]


def test_a_quota_is_kept_beside_an_engine_that_writes(open_tier, put, said, segments):
    tier = open_tier()
    put(tier, MANY)
    before = {path.name for path in segments()}
    code, dry = said("gc", "--max-bytes", "600000", "--dry-run")
    assert 0 == code and dry["segments"] and before == {path.name for path in segments()}
    code, done = said("gc", "--max-bytes", "0")
    assert 1 == done["kept"] and len(before) - 1 == done["segments"]
    assert 1 == len(segments())
    there = tier.contains([key_of(number) for number in MANY], DEADLINE)
    assert len(MANY) - done["blocks"] == sum(there)
    assert {"done"} == set(put(tier, MANY))
    assert {"done"} == set(read(tier, MANY).values())


def test_a_tenant_s_blocks_go_and_no_others(open_tier, put, said):
    tier = open_tier()
    put(tier, MANY)
    _, done = said("gc", "--salt", "other")
    assert len(OTHER) == done["blocks"]
    assert {number: "missing" if number in OTHER else "done" for number in MANY} == read(tier, MANY)
    assert {"none"} == set(said("stat")[1]["spaces"][0]["tenants"])
    said("gc", "--tenant", "none")
    assert not any(tier.contains([key_of(number) for number in MANY], DEADLINE))


def test_age_and_fingerprint_select(open_tier, put, said, segments):
    old, new = open_tier(), open_tier(context={"fingerprint": b"new"})
    put(old, MANY)
    put(new, MANY)
    old.close()
    new.close()
    assert 0 == said("gc", "--older", "3600")[1]["segments"]
    spaces = {path.parent.name for path in segments()}
    gone = old._namespace.path.name
    assert said("gc", "--space", gone[:8])[1]["segments"]
    assert spaces - {gone} == {path.parent.name for path in segments()}
    said("gc", "--older", "0")
    assert [] == [path for path in segments() if path.stat().st_mtime < 0]


@pytest.mark.parametrize(
    "words",
    [[], ["--tenant", "xyz"], ["--tenant", "none", "--salt", "a"], ["--space", "../.."], ["--max-bytes", "-1"],
     ["--older", "-1"], ["--older", "inf"]],
)  # fmt: skip
def test_what_cannot_be_meant_removes_nothing(open_tier, put, said, segments, words):
    put(open_tier(), MANY)
    before = segments()
    with pytest.raises(OptionsInvalid):
        said("gc", *words)
    assert before == segments()


def test_a_folder_of_others_is_not_touched(said, tmp_path):
    (tmp_path / "mine").write_text("")
    for action in ("ls", "stat", "verify"):
        with pytest.raises(OptionsInvalid):
            said(action)
    assert ["mine"] == [path.name for path in tmp_path.iterdir()]


class Vanishing(Disk):
    """Whoever wants to write to a segment finds that an engine has just removed it."""

    def open(self, path, flags):
        if flags & os.O_RDWR and path.suffix == ".seg":
            path.unlink(missing_ok=True)
        return super().open(path, flags)


def test_what_engines_remove_meanwhile_stops_neither_gc_nor_verify(open_tier, put, segments, tmp_path):
    put(open_tier(), MANY)
    damaged = segments()[-1]
    head = Head.decoded(damaged.read_bytes()[:PAGE])
    with damaged.open("r+b") as file:
        file.seek(head.at(0))
        file.write(b"\xa5\x5a")
    root = Root(tmp_path, Vanishing())
    assert 1 == verify_all(root, lambda text: None, repair=True).damaged
    assert damaged not in segments()
    assert 0 == remove(root, Which(tenant=key_tenant(key_of(OTHER[0]))), dry=False).blocks
    assert not segments()


def test_what_cannot_be_read_is_a_problem_and_the_rest_is_verified(open_tier, put, segments, tmp_path):
    put(open_tier(), MANY)

    first = Head.decoded(segments()[0].read_bytes()[:PAGE])

    class Unreadable(Disk):
        def preadv(self, file, buffers, offset):
            if os.fstat(file).st_ino == segments()[0].stat().st_ino and offset >= first.at(3):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().preadv(file, buffers, offset)

    whole = verify_all(Root(tmp_path, Disk()), lambda text: None, repair=False)
    part = verify_all(Root(tmp_path, Unreadable()), lambda text: None, repair=False)
    assert not whole.damaged and 0 < part.damaged and whole.sound == part.sound + part.damaged


def test_segments_in_use_do_not_count_as_removed(open_tier, put, said, segments):
    put(open_tier(), MANY[:1])  # the oldest, which stays
    put(open_tier(), MANY[1:])
    oldest, most = segments()[0], sum(path.stat().st_blocks * 512 for path in segments()) - 4096
    _, done = said("gc", "--max-bytes", str(most))
    assert 1 == done["kept"] == done["segments"] and oldest in segments()
    assert most >= sum(path.stat().st_blocks * 512 for path in segments())


def test_a_segment_that_is_being_made_is_not_damaged(open_tier, put, said, segments):
    answers = []

    class Slow(Disk):
        def fallocate(self, file, nbytes):
            answers.append(said("verify")[0])
            super().fallocate(file, nbytes)
            answers.extend((said("verify")[0], said("gc", "--damaged", "--max-bytes", "0")[1]["segments"]))

    tier = open_tier(Slow())
    put(tier, MANY[:2])
    assert [0, 0, 0] == answers and {"done"} == set(read(tier, MANY[:2]).values())
