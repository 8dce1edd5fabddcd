"""The tables of `tensorway top`: every name in them is somebody's, and rates are of what happened between two looks."""

from __future__ import annotations

import pytest

from tensorway import kv, offload
from tensorway.cli import rendezvous as service
from tensorway.rendezvous import leases
from tensorway.transport import counts
from tensorway_tools.top.looking import Look
from tensorway_tools.top.tables import TABLES, Column, Table, rows

eplb = pytest.importorskip("tensorway_eplb.vocabulary", reason="needs tensorway-eplb: pip install 'tensorway[eplb]'")
#: What is counted, and what is a label of a value because its source says so.
WORDS = {**counts.METRICS, **leases.METRICS, **service.METRICS, **kv.METRICS, **offload.METRICS, **eplb.METRICS}
ALWAYS = {"transport", "endpoint", "engine", "rank", "backend", "group", "member", "store"}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_metric_and_every_label_is_of_a_vocabulary(table):
    names = {metric for column in table.columns for metric in column.metrics}
    assert set() == names - set(WORDS)
    assert set(table.labels) <= ALWAYS | {label for name in names for label in WORDS[name].labels}
    for column in table.columns:
        assert column.mode in ("rate", "total", "mean") or all(WORDS[name].kind == "gauge" for name in column.metrics)
    assert len({column.key for column in table.columns}) == len(table.columns)


JOBS = Table("t", "T", ("who",), (
    Column("done", ("done_total",), "rate"),
    Column("failed", ("failed_total",), "total", hurts=True),
    Column("left", ("left",), "least"),
    Column("each", ("seconds_total", "done_total"), "mean"),
))  # fmt: skip


def look(at, **values):
    """Of two workers; `a_done=3` is what `a` has done."""
    found = {}
    for name, value in values.items():
        who, _, metric = name.partition("_")
        found[metric if metric == "left" else f"{metric}_total", (("who", who),)] = float(value)
    return Look("source", "answers", "", 7, "", at, found)


def test_rates_are_differences_by_the_time_between_the_looks():
    before = look(10.0, a_done=100, a_seconds=1, a_failed=2)
    (row,) = rows(JOBS, {"source": before}, [look(12.0, a_done=110, a_seconds=6, a_failed=3, a_left=4)])
    assert ("a",) == row.labels and 7 == row.pid
    expected = {"done_per_second": 5.0, "failed": 3.0, "failed_per_second": 0.5, "left": 4.0, "each": 0.5}
    assert expected == row.values and ("failed",) == row.hurts


def test_what_began_between_the_looks_has_all_of_it_then_and_what_began_anew_no_rate():
    (row,) = rows(JOBS, {"source": look(10.0)}, [look(11.0, a_done=8)])
    assert 8.0 == row.values["done_per_second"]
    (row,) = rows(JOBS, {"source": look(10.0, a_done=9)}, [look(11.0, a_done=8)])
    assert row.values["done_per_second"] is None
    (row,) = rows(JOBS, {}, [look(11.0, a_done=8)])
    assert row.values["done_per_second"] is None and row.values["each"] is None


def test_a_mean_of_less_than_one_is_none():
    before = look(0.0, a_done=0, a_seconds=0)
    (row,) = rows(JOBS, {"source": before}, [look(1.0, a_done=1e-300, a_seconds=1e17)])
    assert row.values["each"] is None


def test_what_gets_worse_comes_first_then_what_went_wrong():
    before = look(0.0, old_failed=90, worse_failed=0, fine_done=0)
    now = look(1.0, old_failed=90, worse_failed=1, fine_done=5)
    assert [("worse",), ("old",), ("fine",)] == [row.labels for row in rows(JOBS, {"source": before}, [now])]
