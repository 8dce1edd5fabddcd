"""The vocabulary of what is counted, and the text that Prometheus reads: against a strict reader of its format."""

from __future__ import annotations

import math
import re
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import OptionsInvalid
from tensorway.kv import CAUSES, METRICS
from tensorway.metrics import (
    BUCKETS,
    MOST_SERIES,
    OTHERS,
    Counters,
    Metric,
    Sample,
    exposition,
    total,
    vocabulary,
)

WORDS = vocabulary(
    Metric("jobs_total", "counter", ("peer", "cause"), "Jobs."),
    Metric("waiting", "gauge", (), "Jobs that wait; a \\ and\na line."),
    Metric("job_seconds", "seconds", ("peer",), "Time of a job."),
)

# -- a strict reader of the text format, version 0.0.4

NAME, LABEL = r"[a-zA-Z_:][a-zA-Z0-9_:]*", r"[a-zA-Z_][a-zA-Z0-9_]*"
VALUE = r"[+-]?(?:\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+|Inf|NaN)|NaN"
PAIR = re.compile(rf'({LABEL})="((?:[^"\\\n]|\\["\\n])*)"')
LINE = re.compile(rf"({NAME})(?:\{{(.*)\}})? ({VALUE})")


def read(text):
    """Families by name: type, help, samples. Whatever the format does not allow fails."""
    assert text.endswith("\n") or not text
    families, series, current = {}, set(), None
    for line in text.split("\n")[:-1]:
        if match := re.fullmatch(rf"# HELP ({NAME}) ((?:[^\\]|\\\\|\\n)*)", line):
            current = match[1]
            assert current not in families, "one group of lines for each name"
            families[current] = {"help": match[2], "type": None, "samples": []}
        elif match := re.fullmatch(rf"# TYPE ({NAME}) (counter|gauge|histogram|summary|untyped)", line):
            assert match[1] == current and not families[current]["samples"]
            families[current]["type"] = match[2]
        else:
            match = LINE.fullmatch(line)
            assert match, f"no line of the format: {line!r}"
            name, inside, value = match.groups()
            labels = pairs(inside or "")
            base = re.sub(r"_(bucket|sum|count)$", "", name) if families[current]["type"] == "histogram" else name
            assert base == current, f"{name} among the lines of {current}"
            key = (name, tuple(sorted(labels.items())))
            assert key not in series, f"a second value of {key}"
            series.add(key)
            families[current]["samples"].append((name, labels, float(value.replace("Inf", "inf"))))
    for family in families.values():
        if family["type"] == "histogram":
            histogram(family)
    return families


def pairs(inside):
    found, at = {}, 0
    while at < len(inside):
        match = PAIR.match(inside, at)
        assert match, f"no labels: {inside!r}"
        assert match[1] not in found, f"{match[1]} is there twice"
        found[match[1]] = re.sub(r"\\(.)", lambda each: {"n": "\n"}.get(each[1], each[1]), match[2])
        at = match.end()
        assert at == len(inside) or inside[at] == ","
        at += 1
    return found


def histogram(family):
    """Bounds and counts grow, the last bound is infinite and has them all."""
    rows = {}
    for name, labels, value in family["samples"]:
        kind = name.rpartition("_")[2]
        bound = labels.pop("le", None)
        assert (bound is not None) == (kind == "bucket")
        row = rows.setdefault(tuple(sorted(labels.items())), {"bucket": [], "sum": None, "count": None})
        if kind == "bucket":
            row["bucket"].append((float(bound.replace("Inf", "inf")), value))
        else:
            row[kind] = value
    for row in rows.values():
        bounds, counts = zip(*row["bucket"], strict=True)
        assert list(bounds) == sorted(set(bounds)) and bounds[-1] == math.inf
        assert list(counts) == sorted(counts) and counts[-1] == row["count"] and row["sum"] is not None


# -- counting


def counters(**always):
    return Counters(WORDS, **(always or {"backend": "x"}))


def test_what_is_counted_comes_back_with_its_labels():
    counts = counters(backend="x", engine="e")
    counts.add("jobs_total", peer="p", cause="none")
    counts.add("jobs_total", 2, peer="p", cause="none")
    counts.add("jobs_total", cause="lost", peer="q")
    counts.set("waiting", 7)
    counts.set("waiting", 3)
    found = counts.samples()
    always = (("backend", "x"), ("engine", "e"))
    assert [
        Sample("jobs_total", (*always, ("peer", "p"), ("cause", "none")), 3),
        Sample("jobs_total", (*always, ("peer", "q"), ("cause", "lost")), 1),
        Sample("waiting", always, 3),
    ] == found
    assert (4, 3, 1, 0) == tuple(
        total(found, "jobs_total", **labels) for labels in ({}, {"peer": "p"}, {"cause": "lost"}, {"peer": "z"})
    )


@pytest.mark.parametrize(
    "use",
    [
        lambda counts: counts.add("oops"),
        lambda counts: counts.add("jobs_total"),
        lambda counts: counts.add("jobs_total", peer="p"),
        lambda counts: counts.add("jobs_total", peer="p", cause="c", more="m"),
        lambda counts: counts.took("jobs_total", 1.0, peer="p", cause="c"),
        lambda counts: counts.add("job_seconds", peer="p"),
        lambda counts: counts.set("job_seconds", 1.0, peer="p"),
        lambda counts: counts.add("jobs_total", -1, peer="p", cause="c"),
        lambda counts: counts.set("waiting", math.nan),
    ],
)
def test_what_the_vocabulary_has_not_is_refused_where_it_is_counted(use):
    counts = counters()
    with pytest.raises(OptionsInvalid):
        use(counts)
    assert [] == counts.samples()


@pytest.mark.parametrize("label", ["peer", "cause", "le"])
def test_a_label_of_a_metric_is_none_that_all_values_have(label):
    with pytest.raises(OptionsInvalid, match=label):
        Counters(WORDS, **{label: "x"})


def test_a_table_does_not_grow_with_its_peers():
    counts = counters()
    for number in range(MOST_SERIES + 500):
        counts.add("jobs_total", peer=f"p{number}", cause="none")
        counts.took("job_seconds", 0.5, peer=f"p{number}")
    counts.add("jobs_total", 10, peer="p0", cause="none")  # who is known stays known
    found = counts.samples()
    assert MOST_SERIES + 1 == sum(each.metric == "jobs_total" for each in found)
    assert MOST_SERIES + 1 == sum(each.metric == "job_seconds" for each in found)
    assert 500 == total(found, "jobs_total", peer=OTHERS, cause=OTHERS) == total(found, "job_seconds", peer=OTHERS)
    assert 11 == total(found, "jobs_total", peer="p0")
    read(exposition(found, WORDS))


def test_seconds_are_in_the_first_bucket_that_holds_them():
    counts = counters()
    for seconds in (0.0, BUCKETS[0], 0.02, BUCKETS[-1], BUCKETS[-1] + 1):
        counts.took("job_seconds", seconds, peer="p")
    (sample,) = counts.samples()
    assert (5, pytest.approx(2 * BUCKETS[-1] + 1 + BUCKETS[0] + 0.02)) == (sample.count, sample.value)
    assert [sum(each <= bound for each in (0.0, BUCKETS[0], 0.02, BUCKETS[-1])) for bound in BUCKETS] == [
        *sample.buckets
    ]


def test_no_reading_of_a_clock_makes_a_sum_smaller():
    counts = counters()
    counts.took("job_seconds", -1e-9, peer="p")
    counts.took("job_seconds", math.nan, peer="p")
    assert [(2, 0.0, (2,) * len(BUCKETS))] == [(each.count, each.value, each.buckets) for each in counts.samples()]


def test_samples_can_be_taken_while_others_are_counted():
    counts, ended = counters(), threading.Event()

    def count():
        number = 0
        while not ended.is_set():
            number += 1
            counts.add("jobs_total", peer=f"p{number % 900}", cause=f"{number % 7}")
            counts.took("job_seconds", 0.1, peer=f"p{number % 900}")

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(300):
            counts.samples()
        read(exposition(counts.samples(), WORDS))
    finally:
        ended.set()
        thread.join(60)


# -- the text


def test_the_text_is_what_the_format_allows():
    counts = counters(backend='a "b"\\', engine="two\nlines")
    counts.add("jobs_total", 123_456_789, peer="p", cause="")
    counts.set("waiting", 2.5)
    counts.took("job_seconds", 0.2, peer="ü {}=,")
    families = read(exposition(counts.samples(), WORDS))
    always = {"backend": 'a "b"\\', "engine": "two\nlines"}
    assert {"tensorway_jobs_total", "tensorway_waiting", "tensorway_job_seconds"} == set(families)
    assert [("tensorway_jobs_total", {**always, "peer": "p", "cause": ""}, 123_456_789.0)] == families[
        "tensorway_jobs_total"
    ]["samples"]
    assert "Jobs that wait; a \\\\ and\\na line." == families["tensorway_waiting"]["help"]
    assert len(BUCKETS) + 3 == len(families["tensorway_job_seconds"]["samples"])


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.tuples(TEXTS, TEXTS, st.floats(min_value=0, max_value=1e18)), max_size=20))
def test_whatever_peers_are_called_the_text_can_be_read(rows):
    counts, expected = counters(), {}
    for peer, cause, value in rows:
        counts.add("jobs_total", value, peer=peer, cause=cause)
        expected[peer, cause] = expected.get((peer, cause), 0) + value
    text = exposition(counts.samples(), WORDS)
    text.encode()
    found = read(text).get("tensorway_jobs_total", {"samples": []})["samples"]
    assert expected == {(labels["peer"], labels["cause"]): value for _, labels, value in found}


def test_halves_of_surrogates_can_be_written():
    counts = counters()
    counts.add("jobs_total", peer="\ud800", cause="c")
    read(exposition(counts.samples(), WORDS).encode().decode())


def test_the_same_value_of_two_sources_is_one_line():
    one = Sample("waiting", (("backend", "x"),), 2)
    jobs = Sample("jobs_total", (("backend", "x"), ("peer", "p"), ("cause", "none")), 3)
    took = Sample("job_seconds", (("peer", "p"),), 1.0, 1, (0,) * (len(BUCKETS) - 1) + (1,))
    families = read(exposition([one, jobs, took, one, jobs, took], WORDS))
    assert [4.0, 6.0] == [families[f"tensorway_{name}"]["samples"][0][2] for name in ("waiting", "jobs_total")]
    assert ("tensorway_job_seconds_count", {"peer": "p"}, 2.0) in families["tensorway_job_seconds"]["samples"]


def test_labels_that_were_added_win_once():
    sample = Sample("waiting", (("backend", "handover"),), 1).labelled(backend="several", child="a")
    assert (("backend", "several"), ("child", "a")) == sample.labels
    read(exposition([sample], WORDS))


def test_what_the_vocabulary_has_not_is_not_written():
    assert "" == exposition([Sample("oops", (), 1.0)], WORDS)
    assert "" == exposition([], WORDS)


def test_a_reader_that_is_not_ours_reads_the_same():
    parser = pytest.importorskip("prometheus_client.parser", reason="needs it: pip install prometheus-client")
    counts = counters(backend='a "b"\\', engine="two\nlines")
    counts.add("jobs_total", 3, peer="p", cause="none")
    counts.took("job_seconds", 0.2, peer="p")
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parser.text_string_to_metric_families(exposition(counts.samples(), WORDS))
        for sample in family.samples
    }
    always = {"backend": 'a "b"\\', "engine": "two\nlines"}
    labels = tuple(sorted({**always, "peer": "p", "cause": "none"}.items()))
    assert 3 == found["tensorway_jobs_total", labels]
    assert 1 == found["tensorway_job_seconds_count", tuple(sorted({**always, "peer": "p"}.items()))]


# -- what connectors count


def test_the_words_of_connectors_follow_the_rules_of_names():
    for name, metric in METRICS.items():
        assert name == metric.name and re.fullmatch(r"kv_[a-z][a-z_]*", name), name
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert name.endswith("_seconds") == (metric.kind == "seconds"), name
        assert metric.help.endswith(".") and not set(metric.labels) & {"backend", "engine", "rank", "le"}, name
    assert all(re.fullmatch("[a-z]+", cause) for cause in CAUSES) and "none" not in CAUSES
