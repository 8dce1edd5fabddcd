"""What operators are told to watch is what the code counts, and every error of a rebalance has its line."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml

import tensorway
from tensorway import offload
from tensorway.cli import rendezvous
from tensorway.eplb import ExpertLayout, Group
from tensorway.errors import TicketInvalid
from tensorway.kv import CAUSES, METRICS
from tensorway_eplb.background import Background, State
from tensorway_eplb.cycle import Cause
from tensorway_eplb.placement import Placement
from tensorway_eplb.rebalancer import Rebalancer
from tensorway_kv.leases import Ending
from tensorway_vllm.router import vocabulary as router


class Engine:
    """One rank that computes nothing."""

    def commit(self, layer, experts, write):
        write()


@pytest.fixture(scope="module")
def counted():
    """What a rank counts in a rebalance: a group of one has all phases."""
    start = Placement.linear(1, 2, ranks=1, slots=2)
    layout = ExpertLayout.of([{"w13": np.zeros((2, 8))}], 2)
    group = Group("/docs/experts", ("decode-0",), 0)
    with (
        tensorway.create("rendezvous", "direct", {"secret": "the same everywhere"}) as service,
        Rebalancer(service, group, layout, Engine(), placement=start, communicator="onesided") as rebalancer,
    ):
        rebalancer.rebalance(Placement(start.map[:, ::-1], 2, 1))
        return rebalancer.statistics()


def first_cells(rows):
    """The names in the first column of a table."""
    return [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]


def test_the_counters_are_those_of_the_code(page, counted):
    operations = page("operations.md")
    causes = {f"layers_aborted_{cause.value}" for cause in Cause}
    assert counted["layers_committed"] == 1
    shown = first_cells(operations.rows(3, "What a rank counts"))
    assert len(shown) == len(set(shown))
    assert counted.keys() - causes == set(shown)
    assert [f"layers_aborted_{cause.value}" for cause in Cause] == first_cells(
        operations.rows(3, "Why a layer kept its old weights")
    )
    assert causes <= counted.keys()


def test_the_states_of_a_background_rebalance_are_those_of_the_code(page):
    rows = page("operations.md").rows(3, "Where a background rebalance is")
    assert [state.value for state in State] == first_cells(rows)
    for state, row in zip(State, rows, strict=True):
        assert f"`{state.value}_seconds`" in row[-1]
    assert set(Background(None, None, min).statistics()) == {"idle_seconds", "waiting_layers"}


ERRORS = ["PeerLost", "DeadlineExceeded", "Incompatible", "Excluded"]
ERRORS += ["ExpertLost", "StagingFull", "PlacementInvalid", "LayoutInvalid"]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_of_a_rebalance_has_a_line_that_leads_to_the_catalogue(page, error):
    rows = page("operations.md").rows(3, "What fails, what an operator sees, what to do")
    assert any(f"[{error}](reference/errors.md#{error.lower()})" in seen for _, seen, _ in rows)


def test_every_counter_that_a_failure_shows_is_one(page, counted):
    rows = page("operations.md").rows(3, "What fails, what an operator sees, what to do")
    named = {name for row in rows for name in re.findall(r"`(\w+_\w+)`", row[1])}
    assert named - counted.keys() <= {"wrong_found", "waiting_layers"}
    assert {"mismatched_rows", "members_lost"} <= named


@pytest.mark.parametrize(
    ("title", "metrics"),
    [
        ("What a connector counts", METRICS),
        ("What offloading counts", offload.METRICS),
        ("What the router counts", router.METRICS),
    ],
)
def test_the_words_of_a_movement_are_those_of_the_code(page, title, metrics):
    rows = page("operations.md").rows(3, title)
    shown = {name.strip("`"): (kind, re.findall(r"`(\w+)`", labels), what) for name, kind, labels, what, _ in rows}
    assert {name: (each.kind, [*each.labels], each.help) for name, each in metrics.items()} == shown
    assert [*metrics] == [*shown]
    assert all(row[-1] for row in rows), "when to look closer"


def test_every_cause_of_a_request_is_explained_where_it_comes_from(page):
    rows = page("backends/handover.md").rows(2, "How a request fails")
    assert {row[0].strip("`") for row in rows} <= CAUSES


def test_every_cause_of_offloading_is_explained(page):
    rows = page("operations.md").rows(3, "Why blocks were not moved")
    assert sorted(offload.CAUSES) == sorted(row[0].strip("`") for row in rows)
    assert all(what and to_do for _, what, to_do in rows)


RULES = Path(__file__).parents[2] / "docs" / "prometheus" / "tensorway.yaml"
#: What is counted where, by the name of its group of rules, and labels that every value has beside its own.
GROUPS = {
    "tensorway hand-over": (METRICS, {"engine", "rank", "backend"}),
    "tensorway offload": (offload.METRICS, {"engine", "rank", "backend"}),
    "tensorway router": (router.METRICS, set()),
    "tensorway rendezvous": (rendezvous.METRICS, set()),
}
#: One condition within the braces of an expression: label, operator, values.
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
#: What the label `cause` may be, where a set or a type says it.
WHY = {
    "kv_requests_total": CAUSES | {"none"},
    "kv_tickets_refused_total": set(TicketInvalid.CAUSES),
    "kv_leases_ended_total": set(get_args(Ending)),
    "offload_failures_total": offload.CAUSES,
    "offload_dropped_total": offload.CAUSES,
}


@pytest.mark.parametrize("name", GROUPS)
def test_alerts_ask_for_what_is_counted(name):
    """Of each name in a rule: that it is counted, has the labels that are asked for, and these the values."""
    metrics, always = GROUPS[name]
    (group,) = [group for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"] if group["name"] == name]
    assert group["rules"]
    for rule in group["rules"]:
        assert {"alert", "expr"} <= rule.keys() <= {"alert", "expr", "for"}
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "0m")), rule
        asked = re.findall(r"tensorway_(\w+)(?:\{([^}]*)\})?", rule["expr"])
        assert asked, rule
        known = set(always)
        for metric, matchers in asked:
            assert metric in metrics, metric
            known |= set(metrics[metric].labels)
            counter = metrics[metric].kind == "counter"
            assert counter is bool(re.search(rf"(rate|increase)\(tensorway_{metric}\b", rule["expr"])), metric
            for label, _, values in MATCHER.findall(matchers or ""):
                assert label in {*metrics[metric].labels, *always}, f"{metric}: {label}"
                if label == "cause" and metric in WHY:
                    assert set(values.split("|")) <= WHY[metric], values
        for labels in re.findall(r"(?:by|on) \(([\w, ]+)\)", rule["expr"]):
            assert set(labels.split(", ")) <= known, labels
        for opens, closes in ("()", "[]", "{}"):
            assert rule["expr"].count(opens) == rule["expr"].count(closes), rule


def test_every_group_of_rules_is_tested_and_shown(page):
    text = RULES.read_text("utf-8")
    assert [*GROUPS] == [group["name"] for group in yaml.safe_load(text)["groups"]]
    shown = re.findall(r"```\{literalinclude\} prometheus/tensorway.yaml\n((?::.*\n)+)```", page("operations.md").text)
    starts = [re.search(r':start-after: "name: (.*)"', options)[1] for options in shown]
    assert set(GROUPS) == set(starts) and len(starts) == len(GROUPS)
    for options in shown:
        end = re.search(r':end-before: "(.*)"', options)
        assert end is None or end[1] in text


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed: apt-get install prometheus")
def test_prometheus_takes_the_rules():
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, timeout=60)
    assert 0 == done.returncode, done.stdout + done.stderr
