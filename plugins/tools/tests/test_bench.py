"""`tensorway bench` runs real benchmarks in processes that may fail, hang or die, and compares what they measured."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time

import jsonschema
import msgspec
import pytest

from tensorway.errors import OptionsInvalid
from tensorway_tools import bench
from tensorway_tools.bench import comparing, plotting, results
from tensorway_tools.bench.results import SCHEMA, BenchResult, Options, Results, Sample, row_result
from tensorway_tools.benchmark import Row, Run
from tensorway_tools.machine import Machine

SCHEMAS = json.loads((results.Path(bench.__file__).parent / "schemas.json").read_text("utf-8"))["$defs"]

#: Each name is a benchmark of the module below.
MODULE = """
import os, signal, sys, threading, time
from tensorway_tools.benchmark import Benchmark, Row, Run

def spin(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass

def good(run):
    factor = float(open(os.path.join(os.path.dirname(__file__), "factor")).read())
    yield run.measured("waiting", lambda: spin(0.002 * factor), lambda: spin(0.002), to="a wait", rounds=9, clock="cpu")
    yield Row("given", "what is given", (2.0, 4.0), (1.0, 2.0), "cpu", 1000)

def half(run):
    yield Row("first", "it", (1.0,) * 5, (1.0,) * 5)
    raise ValueError("it is broken")

def hangs(run):
    yield Row("first", "it", (1.0,) * 5, (1.0,) * 5)
    child = os.fork()
    if not child:
        time.sleep(1000)
    open(os.path.join(os.path.dirname(__file__), "child"), "w").write(str(child))
    time.sleep(1000)

def dies(run):
    print("the library aborts", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    yield

def rude(run):
    print("{}", flush=True)
    yield Row("\\x1b[2Jevil", "it", (1.0,), (1.0,))

def mute(run):
    yield Row("first", "it", (1.0,) * 5, (1.0,) * 5)
    os.close(int(sys.argv[2]))
    time.sleep(1000)

def floods(run):
    yield Row("first", "it", (1.0,) * 5, (1.0,) * 5)
    while True:
        os.write(int(sys.argv[2]), b" " * 65536)

def deep(run):
    os.write(int(sys.argv[2]), b"[" * 100_000 + b"\\n")
    yield Row("first", "it", (1.0,), (1.0,))

def huge(run):
    yield Row("huge", "it", (10**400,), (1.0,))

def nothing(run):
    return iter(())

def wrong(run):
    yield Row("nan", "it", (float("nan"),), (1.0,))

def vast(run):
    yield Row("vast", "it", (1e6,), (1e-320,))

def twice(run):
    yield Row("same", "it", (1.0,), (1.0,))
    yield Row("same", "it", (1.0,), (1.0,))

def other(run):
    yield "a row"

absent = Benchmark("Needs what is not here.", good, lambda: "acme is not installed: pip install acme")
GOOD, HALF, HANGS, DIES, RUDE, MUTE, FLOODS, DEEP, HUGE, NOTHING, WRONG, VAST, TWICE, OTHER = (
    Benchmark("A test.", each)
    for each in (good, half, hangs, dies, rude, mute, floods, deep, huge, nothing, wrong, vast, twice, other)
)
NONE = 3
"""
NAMES = (
    *("good", "half", "hangs", "dies", "rude", "mute", "floods", "deep", "huge", "nothing", "wrong", "vast", "twice"),
    *("other", "none"),
)


@pytest.fixture
def site(tmp_path):
    """A folder with a dist that brings benchmarks."""
    folder = tmp_path / "site"
    info = folder / "acme_bench-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-bench\nVersion: 1.0\n")
    lines = "\n".join(f"{name} = acme_bench:{name.upper()}" for name in NAMES)
    entries = f"[tensorway.api]\n1 = acme_bench\n[tensorway.bench]\nabsent = acme_bench:absent\n{lines}\n"
    (info / "entry_points.txt").write_text(entries + "gone = acme_bench_gone:X\n")
    (folder / "acme_bench.py").write_text(MODULE)
    (folder / "factor").write_text("1")
    return folder


def command(site, *words, code=0):
    """What it answers, as JSON."""
    environment = {**os.environ, "PYTHONPATH": str(site), "TENSORWAY_PLUGINS": "", "PYTHONWARNINGS": "ignore"}
    line = [sys.executable, "-m", "tensorway", "bench", *words, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=110, cwd=site, env=environment, check=False)
    assert code == done.returncode, done
    answer = json.loads(done.stdout, parse_constant=pytest.fail)  # `Infinity` is no JSON
    if code != 2 and "error" not in answer:
        jsonschema.validate(answer, SCHEMAS[answer["schema"]])
    return answer


def test_rows_of_all_processes_are_in_the_file(site):
    answer = command(site, "run", "good", "--processes", "2", "--output", "out.json")
    read = results.read(site / "out.json")
    assert answer["options"] == {"short": False, "processes": 2}
    (benchmark,) = read.benchmarks
    assert ("good", "acme-bench", "1.0", "measured", "") == (
        benchmark.name, benchmark.dist, benchmark.version, benchmark.state, benchmark.why,
    )  # fmt: skip
    waiting, given = benchmark.rows
    assert [0] * 9 + [1] * 9 == [sample.process for sample in waiting.samples]
    assert 0.5 < waiting.median < 2 and waiting.least <= waiting.median <= waiting.most
    assert [2.0, 2.0] * 2 == given.ratios and ("cpu", 1000) == (given.clock, given.nbytes)
    assert "1.0" == read.versions["acme-bench"] and read.versions["python"]
    assert os.uname().nodename not in (site / "out.json").read_text() or len(os.uname().nodename) < 6


@pytest.mark.parametrize(
    ("name", "state", "rows", "why"),
    [
        ("half", "failed", ["first"], "ValueError: it is broken"),
        ("dies", "failed", [], "its process ended with -9: the library aborts"),
        ("mute", "failed", ["first"], "it said no more, or too much, and was killed"),
        ("floods", "failed", ["first"], "it said no more, or too much, and was killed"),
        ("deep", "failed", [], "what it says cannot be meant"),
        ("huge", "failed", [], "what it says cannot be meant"),
        ("rude", "measured", ["\\x1b[2Jevil"], ""),
        ("nothing", "failed", [], "it has measured nothing"),
        ("wrong", "failed", [], "no samples, or such as are no times"),
        ("vast", "failed", [], "no samples, or such as are no times"),
        ("twice", "failed", ["same"], "is there twice"),
        ("other", "failed", [], "it yields str, not a Row"),
        ("none", "failed", [], "It is no Benchmark."),
        ("gone", "failed", [], "acme_bench_gone"),
    ],
)
def test_what_fails_costs_its_own_rows_and_says_why(site, name, state, rows, why):
    answer = command(site, "run", name, "good", "--short", code=1 if state == "failed" else 0)
    bad, good = answer["benchmarks"]
    assert (state, rows) == (bad["state"], [row["name"] for row in bad["rows"]])
    assert why in bad["why"] and bad["why"].isprintable()
    assert ("measured", 2) == (good["state"], len(good["rows"]))


def test_what_hangs_is_killed_by_its_deadline_with_all_that_it_started(site):
    started = time.monotonic()
    (hung,) = command(site, "run", "hangs", "--short", "--deadline", "15", code=1)["benchmarks"]
    assert time.monotonic() - started < 60
    assert ("failed", ["first"]) == (hung["state"], [row["name"] for row in hung["rows"]])
    assert "had not ended after" in hung["why"]
    has_ended(int((site / "child").read_text()))


def has_ended(child):
    until = time.monotonic() + 30
    while results.Path(f"/proc/{child}").exists() and not zombie(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not results.Path(f"/proc/{child}").exists() or zombie(child)


def test_who_is_told_to_end_takes_along_what_is_measured(site):
    environment = {**os.environ, "PYTHONPATH": str(site), "TENSORWAY_PLUGINS": "", "PYTHONWARNINGS": "ignore"}
    line = [sys.executable, "-m", "tensorway", "bench", "run", "hangs", "--short"]
    process = subprocess.Popen(line, cwd=site, env=environment, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (site / "child").exists() or not (site / "child").read_text():
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert 128 + signal.SIGTERM == process.wait(60)
    finally:
        process.kill()
        process.wait(60)
    has_ended(int((site / "child").read_text()))


def zombie(pid):
    try:
        return results.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_what_is_missing_is_said_and_nothing_is_broken_by_it(site):
    answer = command(site, "run", "absent", "good", "--short")
    assert ("cannot", "acme is not installed: pip install acme") == (
        answer["benchmarks"][0]["state"], answer["benchmarks"][0]["why"],
    )  # fmt: skip
    assert "cannot" == command(site, "run", "absent", "--short", code=3)["benchmarks"][0]["state"]


def test_all_that_are_installed_are_listed(site):
    rows = {row["name"]: row for row in command(site, "list", code=1)["benchmarks"]}
    assert {"good", "absent", "gone", "discovery", "rendezvous", "transport"} <= set(rows)
    assert ("acme-bench", "A test.", "") == tuple(rows["good"][key] for key in ("dist", "summary", "problem"))
    assert "acme_bench_gone" in rows["gone"]["problem"] and not rows["gone"]["summary"]


def test_a_name_that_nothing_brings_and_a_file_that_cannot_be_written_are_said_before_the_work(site):
    error = command(site, "run", "good", "goood", code=4)
    assert "BackendNotFound" == error["error"] and "'goood'" in error["true"]
    error = command(site, "run", "good", "--output", "none/out.json", code=2)
    assert "OptionsInvalid" == error["error"]


def test_the_same_again_is_the_same_and_half_as_much_more_is_slower(site):
    for name, factor in (("a", 1.0), ("b", 1.0), ("slow", 1.5), ("fast", 1 / 1.5)):
        (site / "factor").write_text(str(factor))
        command(site, "run", "good", "--processes", "3", "--output", f"{name}.json")
    verdicts = {}
    for name, code in (("b", 0), ("slow", 1), ("fast", 0)):
        answer = command(site, "compare", "a.json", f"{name}.json", code=code)
        assert answer["comparable"] and [] == answer["differs"] == answer["only_before"] == answer["only_now"]
        verdicts[name] = {row["row"]: row["verdict"] for row in answer["rows"]}
    assert {"b": "same", "slow": "slower", "fast": "faster"} == {
        name: rows["waiting"] for name, rows in verdicts.items()
    }


# -- comparing, without processes


def made(ratios_by_process, **changed):
    """Results with one row."""
    samples = [Sample(process, ratio, 1.0) for process, rows in enumerate(ratios_by_process) for ratio in rows]
    row = row_result(changed.pop("row", "row"), changed.pop("to", "it"), "wall", 0, samples)
    fields = {
        "schema": SCHEMA, "machine": Machine("cpu", 2, 1, "Linux"), "versions": {"python": "3"},
        "options": Options(False, len(ratios_by_process)), "load": (0.0, 0.0),
        "benchmarks": [BenchResult("bench", "dist", "1", "", "measured", "", 1.0, [row])],
    }  # fmt: skip
    return Results(**{**fields, **changed})


def drawn(rng, level, within, between, processes=3, rounds=15):
    """Ratios as machines give them: processes differ, and rounds of each."""
    return [
        [level * math.exp(rng.gauss(shift, within)) for _ in range(rounds)]
        for shift in (rng.gauss(0, between) for _ in range(processes))
    ]


@pytest.mark.parametrize(("within", "between"), [(0.02, 0.0), (0.2, 0.0), (0.02, 0.05), (0.2, 0.1)])
def test_noise_alone_is_seldom_called_slower_and_a_doubling_always(within, between):
    rng = random.Random(repr((within, between)))
    called = {1.0: 0, 2.0: 0}
    for _ in range(300):
        for factor in called:
            pair = [made(drawn(rng, level, within, between)) for level in (1.0, factor)]
            (change,) = comparing.compare(*pair).changes
            called[factor] += change.verdict == "slower"
    assert called[1.0] <= 300 * 0.06, "noise is called a regression"
    assert called[2.0] >= 300 * 0.7, "a regression is called noise"


def test_a_spread_between_processes_counts_although_each_is_quiet():
    steady, apart = [[1.0, 1.01, 0.99] * 5] * 3, [[1.0 * by, 1.01 * by, 0.99 * by] * 5 for by in (1.0, 1.2, 1.4)]
    (change,) = comparing.compare(made(steady), made([[1.2 * ratio for ratio in rows] for rows in steady])).changes
    assert "slower" == change.verdict
    (change,) = comparing.compare(made(steady), made(apart)).changes
    assert ("same", 1.2) == (change.verdict, pytest.approx(change.factor))


def test_other_machines_and_other_settings_are_no_verdict_and_other_versions_are_said():
    steady, slow = [[1.0, 1.01, 0.99] * 5] * 3, [[2.0, 2.01, 1.99] * 5] * 3
    for changed in ({"machine": Machine("another", 2, 1, "Linux")}, {"options": Options(True, 3)}):
        found = comparing.compare(made(steady), made(slow, **changed))
        assert found.differs and ["other"] == [change.verdict for change in found.changes] and not found.slower
    found = comparing.compare(made(steady), made(slow, versions={"python": "4", "numpy": "1"}))
    assert ["numpy: none, and 1 now", "python: 3, and 4 now"] == found.versions and found.slower
    found = comparing.compare(made(steady), made(slow, to="another reference"))
    assert ["other"] == [change.verdict for change in found.changes]
    found = comparing.compare(made(steady), made(slow, row="renamed"))
    assert ([], ["bench: row"], ["bench: renamed"]) == (found.changes, found.only_before, found.only_now)


def test_of_few_rounds_nothing_is_said():
    (change,) = comparing.compare(made([[1.0, 1.0]]), made([[9.0, 9.0]])).changes
    assert "unknown" == change.verdict


@pytest.mark.parametrize(
    ("before", "now", "factor", "verdict"),
    [
        ([1.0] * 5, [1e-300] * 5, 1e-300, "faster"),
        ([1.0, 1e-300] * 3, [1.0] * 6, 2.0, "same"),  # no noise would explain more
        ([1.0] * 5, [0.0] * 5, 0.0, "unknown"),
        ([0.0] * 5, [1.0] * 5, None, "unknown"),
        ([1e-300] * 5, [1e299] * 5, None, "unknown"),
    ],
)
def test_ratios_of_any_size_are_compared_and_what_is_no_number_is_null(tmp_path, before, now, factor, verdict):
    for name, ratios in (("before", before), ("now", now)):
        samples = [Sample(0, ratio * 1e-300, 1e-300) if ratio > 1e6 else Sample(0, ratio, 1.0) for ratio in ratios]
        whole = made([[1.0]])
        row = row_result("row", "it", "wall", 0, samples)
        results.write(tmp_path / name, msgspec.structs.replace(
            whole, benchmarks=[msgspec.structs.replace(whole.benchmarks[0], rows=[row])]
        ))  # fmt: skip
    answer = command(tmp_path, "compare", "before", "now")
    (found,) = answer["rows"]
    assert (verdict, factor) == (found["verdict"], pytest.approx(factor))
    line = [sys.executable, "-m", "tensorway", "bench", "compare", "before", "now"]
    text = subprocess.run(line, capture_output=True, text=True, timeout=110, cwd=tmp_path, check=True).stdout
    assert "inf" not in text and ("x ? " in text) == (factor is None)
    assert max(map(len, text.splitlines())) < 120


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": "tensorway.bench/2"}',
        "[" * 10_000,
        "\x00",
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "file").write_text(text)
    with pytest.raises(OptionsInvalid):
        results.read(tmp_path / "file")


def test_a_file_that_was_tampered_with_is_refused(tmp_path):
    path = tmp_path / "file"
    results.write(path, made([[1.0] * 5]))
    assert made([[1.0] * 5]) == results.read(path)
    whole = json.loads(path.read_text())
    row = whole["benchmarks"][0]["rows"][0]
    for samples in (
        [],
        [[0, 1.0, 0.0]],
        [[0, -1.0, 1.0]],
        [[0, "1", 1.0]],
        [[0, 1e300, 1.0]],
        [[0, 1.0, 1e-305]] * 2,
        [[0, 1.0]],
    ):
        path.write_text(
            json.dumps({**whole, "benchmarks": [{**whole["benchmarks"][0], "rows": [{**row, "samples": samples}]}]})
        )
        with pytest.raises(OptionsInvalid):
            results.read(path)
    path.write_text(json.dumps({**whole, "benchmarks": whole["benchmarks"] * 2}))
    with pytest.raises(OptionsInvalid, match="twice"):
        results.read(path)
    with pytest.raises(OptionsInvalid):
        results.read(tmp_path / "none")


def test_files_are_drawn_side_by_side(site):
    for name in ("a", "b"):
        command(site, "run", "good", "--short", "--output", f"{name}.json")
    assert "page.html" == command(site, "plot", "a.json", "b.json", "--output", "page.html")["page"]
    text = (site / "page.html").read_text("utf-8")
    assert "good: times a wait" in text and ">a<" in text and ">b<" in text and "<svg" in text
    assert "OptionsInvalid" == command(site, "plot", "a.json", "--output", "page.pdf", code=2)["error"]


def test_charts_have_what_all_files_have():
    one, other = made([[1.0] * 5]), made([[2.0] * 5])
    (chart,) = plotting.charts(["a", "a"], [one, other])
    assert ["a (1)", "a (2)"] == [series.name for series in chart.series]
    assert [(1.0,), (2.0,)] == [series.values for series in chart.series]
    with pytest.raises(OptionsInvalid):
        plotting.charts(["a", "b"], [one, made([[1.0] * 5], row="renamed")])


# -- the contract


def test_both_are_measured_in_turns_and_the_first_calls_are_not_counted():
    calls = []
    row = Run(False, None, None).measured(
        "a", lambda: calls.append("ours"), lambda: calls.append("its"), to="b", rounds=3
    )
    assert isinstance(row, Row) and 3 == len(row.ours) == len(row.reference)
    assert ["its", "ours", "ours", "its", "its", "ours", "ours", "its"] == calls


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_ours_is_over_the_reference_whoever_begins(clock):
    def spin(seconds):
        tick = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
        until = tick() + seconds
        while tick() < until:
            pass

    row = Run(False, None, None).measured("a", lambda: spin(0.2), lambda: spin(0.01), to="b", rounds=5, clock=clock)
    # Twenty; less where somebody else has the processor for a while, and never the other way round.
    assert 2 < statistics.median(ours / its for ours, its in zip(row.ours, row.reference, strict=True))
