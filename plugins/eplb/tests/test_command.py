"""`tensorway eplb` as people run it: real processes, real files, never a traceback; and files that mean no good."""

from __future__ import annotations

import argparse
import html.parser
import io
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import zipf

from tensorway import cli, plugins
from tensorway.cli import charts, pages
from tensorway.errors import PlacementInvalid, TensorwayError
from tensorway.types import Offer, ProbeResult
from tensorway_eplb.command import inputs, replay
from tensorway_eplb.gate import CODES
from tensorway_eplb.placement import Placement

WEIGHTS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
START = ("--ranks", "8", "--slots", "2", "--per-node", "4")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps(WEIGHTS))
    return tmp_path


def eplb(folder, *arguments, code=0):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TENSORWAY_", "COLUMNS"))}
    done = subprocess.run(
        [sys.executable, "-m", "tensorway", "eplb", *arguments],
        cwd=folder,
        env=kept,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert code == done.returncode, done.stderr
    return done


SCHEMAS = json.loads((resources.files("tensorway_eplb.command") / "schemas.json").read_text("utf-8"))["$defs"]


def answer(folder, *arguments, code=0):
    """What `--json` prints: every answer of every test has the shape that its schema says."""
    found = json.loads(eplb(folder, *arguments, "--json", code=code).stdout)
    assert (code == 0) == (found["schema"] in SCHEMAS)
    if code == 0:
        validator(found["schema"]).validate(found)
    return found


def validator(name):
    return jsonschema.Draft202012Validator(SCHEMAS[name])


# -- plan


def test_plan_of_the_published_example(folder):
    plan = (folder, "plan", "--loads", "w.json", *START, "--policy", "deepseek:num_groups=4")
    found = answer(*plan, "--output", "new.json", "--row-bytes", "1000", "--rate", "1e6", "--work", "60")
    assert "tensorway.eplb-plan/1" == found["schema"]
    assert {"before": 0.4464, "after": 0.8156} == {key: round(value, 4) for key, value in found["balancedness"].items()}
    rows, moved = found["rows"], found["bytes"]
    assert (rows["same_node"] * 1000, rows["across_nodes"] * 1000) == (moved["same_node"], moved["across_nodes"])
    links = found["links"]
    assert sum(moved.values()) == sum(link["bytes"] for link in links)
    assert sorted(links, key=lambda link: -link["bytes"]) == links
    busiest = max(
        sum(link["bytes"] for link in links if link[end] == rank) for rank in range(8) for end in ("source", "target")
    )
    assert pytest.approx(busiest / 1e6) == found["seconds"]
    assert (True, "worth-it") == (found["gate"]["rebalance"], found["gate"]["code"])
    saved = Placement.load(folder / "new.json")
    assert (1, [5, 6, 5, 7]) == (saved.epoch, saved.map[0, :4].tolist())
    text = eplb(*plan, "--placement", "new.json", code=2).stderr
    assert "Both --placement and --ranks or --slots were given." in text


def test_plan_for_people(folder):
    done = eplb(folder, "plan", "--loads", "w.json", *START, "--row-bytes", "44000000", "--rate", "20e9", "--work", "9")
    assert "balancedness   0.4464 -> 0.8" in done.stdout
    assert "gate           rebalance: the balance goes from" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_a_dry_run_saves_nothing(folder):
    found = answer(folder, "plan", "--loads", "w.json", *START, "--output", "new.json", "--dry-run")
    assert ("", ["w.json"]) == (found["output"], [path.name for path in folder.iterdir()])
    assert (None, None, []) == (found["bytes"], found["seconds"], found["links"])


def test_plan_keeps_the_budget_and_knows_slow_ranks(folder):
    found = answer(folder, "plan", "--loads", "w.json", *START, "--budget", "3")
    assert found["most_receives_per_layer"] <= 3
    slow = answer(folder, "plan", "--loads", "w.json", *START, "--speeds", "1,1,1,1,1,1,1,0.5")
    assert slow["balancedness"]["after"] > slow["balancedness"]["before"]
    eplb(folder, "plan", "--loads", "w.json", *START, "--speeds", "1,1", code=2)


def test_plan_brings_lost_experts_back(folder):
    Placement.linear(2, 12, 8, 2).without([2]).save(folder / "left.json")
    found = answer(folder, "plan", "--loads", "w.json", "--placement", "left.json")
    assert "lost" == found["gate"]["code"]
    assert found["rows"]["from_copies"] >= 4  # two experts of two layers, once at least


def test_loads_may_be_json_or_csv_or_npy(folder):
    (folder / "w.csv").write_text("\n".join(",".join(map(str, row)) for row in WEIGHTS) + "\n\n")
    np.save(folder / "w.npy", np.array(WEIGHTS, dtype=np.float32))
    np.save(folder / "columns.npy", np.asfortranarray(WEIGHTS))
    (folder / "named.json").write_text(json.dumps({"loads": WEIGHTS}))
    for name in ("w.json", "w.csv", "w.npy", "columns.npy", "named.json"):
        assert WEIGHTS == inputs.snapshot(folder / name).tolist(), name


class Opens:
    """What a pickle could do."""

    def __reduce__(self):
        return (os.mkdir, ("pickled",))


HOSTILE = {
    "nan.json": b"[[1, NaN]]",
    "infinite.json": b"[[1, 1e999]]",
    "negative.json": b"[[1, -2]]",
    "ragged.json": b"[[1, 2], [3]]",
    "deep.json": b"[" * 100_000,
    "words.json": b'[["1", "2"]]',
    "truth.json": b"[[true, false]]",
    "huge.json": b"[[1" + b"0" * 500 + b"]]",
    "empty.json": b"[]",
    "hollow.json": b"[[], []]",
    "flat.json": b"[1, 2]",
    "other.json": b'{"weights": [[1, 2]]}',
    "bytes.json": b"\xff\xfe\x00",
    "ragged.csv": b"1,2\n3\n",
    "nan.csv": b"1,nan\n",
    "words.csv": b"expert,load\n",
    "empty.csv": b"",
    "bytes.csv": b"\xff\xfe,\x00",
    "empty.npy": b"",
    "text.npy": b"\x93NUMPY\x01\x00\x05\x00hello",
    "name.txt": b"1,2",
    "noname": b"1,2",
}


def npy(array, **head):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"shape": array.shape, "fortran_order": False, "descr": array.dtype.str} | head
    )
    return file.getvalue() + array.tobytes()


def hostile_arrays():
    pickled = io.BytesIO()
    np.save(pickled, np.array([[Opens()]], dtype=object), allow_pickle=True)
    numbers = np.ones((2, 2))
    yield "pickle.npy", pickled.getvalue()
    yield "claims.npy", npy(numbers, shape=(1 << 40, 1 << 20))
    yield "short.npy", npy(numbers)[:-1]
    yield "long.npy", npy(numbers) + b"x"
    yield "strings.npy", npy(np.array([["a", "b"]]))
    yield "complex.npy", npy(numbers.astype(complex))
    yield "one.npy", npy(np.ones(3))
    yield "four.npy", npy(np.ones((1, 1, 1, 1)))
    yield "nan.npy", npy(numbers * np.nan)
    yield "negative.npy", npy(-numbers)


@pytest.mark.parametrize(("name", "data"), [*HOSTILE.items(), *hostile_arrays()], ids=lambda value: str(value)[:20])
def test_loads_of_a_hostile_file_are_refused_in_three_lines(folder, name, data, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / name).write_bytes(data)
    with pytest.raises(PlacementInvalid) as caught:
        inputs.snapshot(folder / name)
    assert 3 == len(str(caught.value).splitlines())
    assert name in caught.value.asked
    assert not (folder / "pickled").exists()


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".json", ".csv", ".npy"]), magic=st.booleans())
def test_no_bytes_are_anything_but_loads_or_refused(tmp_path_factory, data, suffix, magic):
    path = tmp_path_factory.mktemp("loads") / f"w{suffix}"
    path.write_bytes((b"\x93NUMPY\x01\x00" if magic else b"") + data)
    try:
        found = inputs.series([path])
    except PlacementInvalid:
        return
    assert 3 == found.ndim
    assert np.isfinite(found).all()
    assert (found >= 0).all()


def test_a_file_that_is_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(inputs, "_MAX_BYTES", {".json": 10})
    with pytest.raises(PlacementInvalid, match="more than 10 bytes"):
        inputs.snapshot(folder / "w.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "--loads", "absent.json", *START), "No such file"),
        (("plan", "--loads", ".", *START), "ends with ''"),
        (("plan", "--loads", "w.json"), "It was not said where the experts are."),
        (("plan", "--loads", "w.json", "--ranks", "2"), "It was not said where the experts are."),
        (("plan", "--loads", "w.json", "--ranks", "2", "--slots", "2"), "There is room for 4."),
        (("plan", "--loads", "w.json", "--ranks", "99999999", "--slots", "99999999"), "too many to plan for"),
        (("plan", "--loads", "w.json", "--placement", "w.json"), "It holds no placement"),
        (("plan", "--loads", "w.json", *START, "--policy", "deepseek:groups"), "no option with a value"),
        (("plan", "--loads", "w.json", *START, "--policy", "deepseek:groups=4"), "has no option 'groups'"),
        (("plan", "--loads", "w.json", *START, "--output", "no/new.json"), "its folder cannot be written to"),
        (("plan", "--loads", "w.json", *START, "--plot", "new.svg"), "ends with '.svg'"),
        (("plan", "--loads", "w.json", *START, "--plot", "no/new.html"), "its folder cannot be written to"),
        (("plan", "--loads", "w.json", *START, "--rate", "0"), "a number above 0"),
        (("plan", "--loads", "w.json", *START, "--budget", "-1"), "a whole number from 0 on"),
        (("plan",), "--loads"),
        ((), "usage: tensorway eplb"),
    ],
)
def test_what_cannot_be_meant_is_usage(folder, arguments, words, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    try:
        code = cli.main(["eplb", *arguments])
    except SystemExit as error:  # argparse
        code = error.code
    assert (2, True) == (code, words in capsys.readouterr().err)


def test_a_policy_that_nobody_offers_is_not_found(folder):
    found = answer(folder, "plan", "--loads", "w.json", *START, "--policy", "incremntal", code=4)
    assert ("tensorway.error/1", True) == (found["schema"], "Did you mean 'incremental'?" in found["to_do"])


def test_a_pipe_is_written_to_and_not_replaced(folder):
    os.mkfifo(folder / "pipe")
    end = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # so that to open it for writing does not wait
    try:
        answer(folder, "plan", "--loads", "w.json", *START, "--output", "pipe")
        (folder / "kept.json").write_bytes(os.read(end, 1 << 16))
    finally:
        os.close(end)
    assert (folder / "pipe").is_fifo()
    assert 12 == Placement.load(folder / "kept.json").num_logical


# -- schemas


def objects(schema):
    """Every object that a schema describes."""
    if isinstance(schema, dict):
        if "object" in schema.get("type", ()):
            yield schema
        for below in schema.values():
            yield from objects(below)
    elif isinstance(schema, list):
        for below in schema:
            yield from objects(below)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one_and_names_every_field(name):
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    assert {"const": name} == SCHEMAS[name]["properties"]["schema"]
    for described in objects(SCHEMAS[name]):
        assert list(described["properties"]) == described["required"]
        assert described["additionalProperties"] is False


def test_the_schema_knows_every_code_of_the_gate():
    gate = SCHEMAS["tensorway.eplb-plan/1"]["properties"]["gate"]["properties"]
    assert list(CODES) == gate["code"]["enum"]


def test_an_answer_with_a_field_too_many_or_too_few_or_of_another_kind_is_not_valid(folder):
    plan = answer(folder, "plan", "--loads", "w.json", *START)
    assert validator("tensorway.eplb-plan/1").is_valid(plan)
    for change in ({"more": 1}, {"seconds": "0.1"}, {"links": None}, {"gate": {**plan["gate"], "code": "perhaps"}}):
        assert not validator("tensorway.eplb-plan/1").is_valid({**plan, **change}), change
    for field in plan:
        kept = {key: value for key, value in plan.items() if key != field}
        assert not validator("tensorway.eplb-plan/1").is_valid(kept), field


# -- pictures


class Tags(html.parser.HTMLParser):
    """Every tag closed, and nothing fetched from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert tag == self.open.pop()


def test_the_page_needs_nothing_else_and_follows_light_and_dark(folder):
    done = eplb(folder, "plan", "--loads", "w.json", *START, "--plot", "plan.html")
    assert "drawn in       plan.html" in done.stdout
    text = (folder / "plan.html").read_text("utf-8")
    tags = Tags()
    tags.feed(text)
    # Each of the two charts for a wide and for a narrow window; one has two lines, the other has points alone.
    assert ([], 4, 4) == (tags.open, tags.seen.count("svg"), tags.seen.count("polyline"))
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text


def test_names_in_a_page_are_only_names():
    chart = charts.Chart("<b>", "x", (charts.Series("<script>", (1.0, 2.0)), charts.Series("one", (1.5, 1.5))))
    assert "<script>" not in pages.charted("<i>", [chart])


@pytest.mark.parametrize("values", [(0.0,), (1.0, 1.0), (1e-9, 1e9), (0.4, 0.9, 0.95)])
def test_any_values_can_be_drawn(values):
    tags = Tags()
    tags.feed(pages.charted("t", [charts.Chart("t", "x", (charts.Series("a", values),))]))
    assert [] == tags.open
    low, high = charts.Chart("t", "x", (charts.Series("a", values),)).range
    ticks = pages._steps(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)


def test_a_png_where_matplotlib_is_installed(folder):
    pytest.importorskip("matplotlib")
    eplb(folder, "plan", "--loads", "w.json", *START, "--plot", "plan.png")
    assert b"\x89PNG" == (folder / "plan.png").read_bytes()[:4]


def test_without_matplotlib_a_png_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    with pytest.raises(TensorwayError, match="matplotlib"):
        charts.drawable(Path("plan.png"))
    charts.drawable(Path("plan.html"))


# -- replay


def test_replay_puts_policies_side_by_side(folder):
    rng = np.random.default_rng(1)
    loads = zipf(3, 64, seed=1) * np.exp(rng.normal(0, 0.1, (5, 3, 64)))
    np.save(folder / "series.npy", loads)
    names = "deepseek,deepseek:relabel=true,incremental"
    start = ("--ranks", "8", "--slots", "9", "--per-node", "4")
    found = answer(folder, "replay", "--loads", "series.npy", "--policies", names, *start, "--plot", "r.html")
    assert ("tensorway.eplb-replay/1", 5) == (found["schema"], found["sets"])
    rows = {row["policy"]: row for row in found["policies"]}
    assert names.split(",") == list(rows)
    assert {5} == {len(row["steps"]) for row in rows.values()}
    plain, renamed, ours = rows.values()
    assert plain["received"] > renamed["received"] > ours["received"]
    assert ours["after"] > plain["after"] - 0.01
    assert all(row["after"] > row["before"] for row in rows.values())
    assert (folder / "r.html").exists()
    text = eplb(folder, "replay", "--loads", "series.npy", *start).stdout
    assert all(name in text for name in rows)
    assert all(len(line) <= 80 for line in text.splitlines())


def test_replay_takes_files_in_order_of_time(folder):
    (folder / "later.json").write_text(json.dumps([row[::-1] for row in WEIGHTS]))
    found = answer(folder, "replay", "--loads", "w.json", "later.json", *START, "--policies", "incremental")
    assert 2 == found["sets"]
    (folder / "other.json").write_text("[[1, 2]]")
    text = eplb(folder, "replay", "--loads", "w.json", "other.json", *START, code=2).stderr
    assert "(1, 2) layers and experts, and the first file (2, 12)" in text


class Reversing:
    """A policy from elsewhere."""

    def __init__(self, options, context):
        pass

    def place(self, loads, current, topology, budget):
        return Placement(current.map[:, ::-1], current.num_logical, current.ranks, current.epoch + 1)


def passes():
    return ProbeResult.passed("yes")


def test_a_policy_of_somebody_else_is_replayed_like_ours(folder):
    offer = Offer("reversing", "placement_policy", "A test.", passes, Reversing, probe_in="host")
    given = argparse.Namespace(placement=None, ranks=8, slots=2, per_node=4, speeds=None, budget=None)
    loads = inputs.series([folder / "w.json"])
    with plugins.isolated([offer]):
        policy = inputs.policy("reversing")
    (step,) = replay.chain(policy, loads, inputs.question(given, loads))
    assert step.received > 0
