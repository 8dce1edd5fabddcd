"""Replays: what is counted, the two bounds, and traces that mean no good."""

from __future__ import annotations

import io
import itertools
import json
import random
import subprocess
import sys
from importlib import resources

import jsonschema
import pytest

from tensorway.cli.output import Output
from tensorway.errors import BackendNotFound, OptionsInvalid, TensorwayError
from tensorway.offload import PolicyContext, make_offload_key
from tensorway_offload import replay
from tensorway_offload.command import command
from tensorway_offload.command.traces import read
from tensorway_offload.policies.lru import Lru
from tensorway_offload.replay import Clock, Request
from tensorway_offload.testing.traces import GENERATORS

SCHEMAS = json.loads((resources.files("tensorway_offload.command") / "schemas.json").read_text("utf-8"))["$defs"]


def requests(*rows):
    return [
        Request(float(at), tuple(make_offload_key(number.to_bytes(8, "big")) for number in row))
        for at, row in enumerate(rows)
    ]


def found(rows, capacity, **wants):
    return list(replay.hits(Lru(PolicyContext(capacity, Clock())), rows, capacity, Clock(), **wants))


def test_hits_are_the_blocks_before_the_first_that_is_missing():
    rows = requests((1, 2, 3), (1, 2, 3, 4), (9,), (1, 2, 3, 4))
    assert [0, 3, 0, 3] == found(rows, 4)  # 9 took the place of 4, the tail of what was used longest ago
    assert [0, 3, 0, 4] == found(rows, 5) == list(replay.endless(rows))


def test_of_a_request_that_is_longer_than_there_is_room_its_head_is_kept():
    assert [0, 2] == found(requests((1, 2, 3, 4), (1, 2, 3, 4)), 2)


@pytest.mark.parametrize("step", [1, 2, 7])
def test_parts_that_are_stored_one_after_the_other_find_what_a_whole_finds(step):
    rows = GENERATORS["chats"](random.Random(2), 200)
    assert sum(found(rows, 300)) == pytest.approx(sum(found(rows, 300, step=step)), rel=0.05)


def test_belady_is_what_no_order_of_single_blocks_can_better():
    rng = random.Random(1)
    for _ in range(6):
        numbers = [rng.randrange(4) for _ in range(8)]
        rows = requests(*((number,) for number in numbers))
        best = 0
        for choices in itertools.product(range(3), repeat=len(numbers)):  # which of two goes, or the new one itself
            here, count = [], 0
            for number, choice in zip(numbers, choices, strict=True):
                if number in here:
                    count += 1
                elif len(here) < 2:
                    here.append(number)
                elif choice < 2:
                    here[choice] = number
            best = max(best, count)
        assert best == sum(replay.belady(rows, 2))


def test_belady_keeps_the_head_of_what_comes_back_together():
    assert [0, 2] == list(replay.belady(requests((1, 2, 3), (1, 2, 3)), 2))


BROKEN = [
    ("", "no request"),
    ("[]", "Line 1"),
    ('{"hash_ids": [1]}\nnonsense', "Line 2"),
    ('{"hash_ids": [1.5]}', "Line 1"),
    ('{"hash_ids": [-1]}', "Line 1"),
    ('{"hash_ids": ["1"]}', "Line 1"),
    ('{"hash_ids": [99999999999999999999]}', "Line 1"),
    ('{"hash_ids": [1, 1]}', "twice"),
    ('{"hash_ids": []}', "no request"),
    ('{"timestamp": 5, "hash_ids": [1]}\n\n{"timestamp": 4, "hash_ids": [1]}', "line 3"),
    ('{"timestamp": 1e999, "hash_ids": [1]}', "ine 1"),
    ('{"timestamp": NaN, "hash_ids": [1]}', "Line 1"),
    ('{"hash_ids": ' + "[" * 100_000, "Line 1"),
]


@pytest.mark.parametrize(("text", "words"), BROKEN)
def test_a_trace_that_is_none_is_three_lines_that_name_the_line(tmp_path, text, words):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(OptionsInvalid) as caught:
        read(path, Output())
    assert words in caught.value.true and str(path) in caught.value.asked


def test_a_file_that_is_none_is_refused(tmp_path):
    for path in (tmp_path / "no", tmp_path):
        with pytest.raises(OptionsInvalid, match="does not read it"):
            read(path, Output())


def test_random_bytes_are_a_refusal_or_a_trace(tmp_path):
    rng, path = random.Random(5), tmp_path / "trace.jsonl"
    good = b'{"timestamp": 1, "hash_ids": [1, 2, 3], "input_length": 7}\n' * 3
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            assert read(path, Output())
        except OptionsInvalid:
            pass


@pytest.fixture
def trace(tmp_path):
    numbers = {}
    with (tmp_path / "trace.jsonl").open("w") as file:
        for row in GENERATORS["chats"](random.Random(1), 150):
            ids = [numbers.setdefault(key, len(numbers)) for key in row.keys]
            file.write(json.dumps({"timestamp": row.at * 1000, "hash_ids": ids}) + "\n")
    return tmp_path / "trace.jsonl"


def test_the_answer_is_one_object_of_its_schema_with_every_policy_and_a_picture(trace):
    out = Output(as_json=True, stream=io.StringIO(), notes=io.StringIO())
    page = trace.with_name("page.html")
    assert 0 == command(["replay", str(trace), "--capacities", "5%,50", "--plot", str(page)], out)
    answer = json.loads(out.stream.getvalue())
    jsonschema.validate(answer, SCHEMAS["tensorway.offload-replay/1"])
    assert ["lru", "arc", "s3fifo", "sieve", "tinylfu", "foresight"] == [row["policy"] for row in answer["policies"]]
    assert all(value <= answer["endless"] for row in answer["policies"] for value in row["hits"])
    assert "5%" in page.read_text() and "100%" in out.notes.getvalue()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--policies", "no-such"], BackendNotFound),
        (["--policies", "lru:x"], OptionsInvalid),
        (["--policies", "lru:x=1"], OptionsInvalid),
        (["--policies", "tinylfu:window=2"], OptionsInvalid),
        (["--plot", "page.svg"], TensorwayError),
    ],
)
def test_what_cannot_be_replayed_is_said_before_the_work(trace, words, error):
    out = Output(stream=io.StringIO())
    with pytest.raises(error):
        command(["replay", str(trace), *words], out)
    assert "" == out.stream.getvalue()


def test_it_runs_as_a_command(trace):
    done = subprocess.run(
        [sys.executable, "-m", "tensorway", "offload", "replay", str(trace), "--policies", "lru,tinylfu:window=0.1"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert 0 == done.returncode and "Traceback" not in done.stderr
    assert "tinylfu:window=0.1" in done.stdout and "Belady" in done.stdout
