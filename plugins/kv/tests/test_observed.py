"""What is seen of a hand-over: bytes, pieces and phases that are true, and spans for who asks for them."""

from __future__ import annotations

import importlib.util
import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import spans
from engines import Shape, leftovers

from tensorway.errors import BackendUnavailable
from tensorway.kv import METRICS, KVContext, RequestView, Result
from tensorway.metrics import Counters, total
from tensorway.testing.ranks import RankFailed
from tensorway.transport import State
from tensorway_kv.observed import Ended, Observer, moved
from tensorway_kv.testing.engine import Deployment, counted, until, verify

TOKENS = 19
THEIRS, OURS = [[9, 3, 17, 5, 1]], [[2, 8, 4, 11, 7]]
needs_sdk = pytest.mark.skipif(
    not importlib.util.find_spec("opentelemetry") or not importlib.util.find_spec("opentelemetry.sdk"),
    reason="needs OpenTelemetry: pip install opentelemetry-sdk",
)


@pytest.fixture
def deployment(ranks):
    made = Deployment(ranks, deadline=3.0)
    yield made
    made.close()


def hand_over(producer, consumer, name="one", have=0):
    ticket = producer.finish(name, THEIRS, TOKENS)
    view = RequestView(f"{name}-here", TOKENS, ticket)
    consumer.ask("reserve", view, OURS, have, TOKENS - have)
    until(lambda: f"{name}-here" in (*consumer.received, *consumer.failed), consumer, producer)


@pytest.mark.parametrize("tp", [1, 2])
def test_bytes_and_pieces_are_those_that_were_moved(deployment, tp):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape(tp))
    hand_over(producer, consumer)
    consumer.each(verify, OURS, 0, TOKENS, 1)
    expected = [2 * 2 * TOKENS * 6 // tp * 8] * tp  # layers, keys and values, tokens, heads of a rank, bytes of one
    labels = {"direction": "pull", "peer": "prefill"}
    assert expected == consumer.each(counted, "mover", "kv_bytes_total", labels)
    assert all(pieces >= 2 * 2 for pieces in consumer.each(counted, "mover", "kv_pieces_total", labels))
    hand_over(producer, consumer, "two", have=TOKENS)  # nothing is missing, and nothing moves
    assert expected == consumer.each(counted, "mover", "kv_bytes_total", labels)


def test_bytes_of_what_is_not_done_have_not_arrived():
    def transfer(state):
        return SimpleNamespace(poll=lambda: state, nbytes=10, pieces=3)

    assert (20, 12) == moved(map(transfer, (State.DONE, State.PENDING, State.DONE, State.FAILED)))


def test_a_request_that_failed_is_counted_with_its_cause_and_the_phases_that_ended():
    counts = Counters(METRICS, backend="x", engine="e")
    observer = Observer(counts, KVContext("e", None, "mover"), spans=False)
    observer.ended(Ended("pull", "p", Result("r", "received", "lost", "gone"), 0.1, {"handshake": 0.5}, 0.7))
    observer.ended(Ended("push", "p", Result("s", "received"), 0.0, {"posted": 0.5}, 0.7, 100, 2))
    found = counts.samples()
    assert 1 == total(found, "kv_transfers_total", cause="lost", direction="pull", peer="p")
    assert 1 == total(found, "kv_transfers_total", cause="none", direction="push", peer="p")
    assert [1, 0] == [
        total(found, "kv_phase_seconds", phase=phase, direction="pull") for phase in ("handshake", "done")
    ]
    assert (100, 2) == (total(found, "kv_bytes_total"), total(found, "kv_pieces_total"))


def test_spans_without_the_library_are_refused_with_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(BackendUnavailable, match="pip install opentelemetry-sdk"):
        Observer(Counters(METRICS), KVContext("e", None, "mover"), spans=True)
    Observer(Counters(METRICS), KVContext("e", None, "mover"), spans=False)


@needs_sdk
def test_every_request_is_one_span_with_its_phases(deployment):
    producer = deployment.engine("prefill", Shape(2))
    consumer = deployment.engine("decode", Shape(2), spans=True)
    consumer.each(spans.collect)
    before = time.time_ns()
    hand_over(producer, consumer)
    after = time.time_ns()
    for rank, found in enumerate(consumer.each(spans.told)):
        root, *phases = sorted(found, key=lambda span: span["parent"] != "")
        assert ("kv.pull", "", "UNSET") == (root["name"], root["parent"], root["status"])
        assert {
            "tensorway.backend": "handover", "tensorway.engine": "decode", "tensorway.rank": rank,
            "tensorway.request": "one-here", "tensorway.peer": "prefill", "tensorway.direction": "pull",
            "tensorway.cause": "none", "tensorway.bytes": 2 * 2 * TOKENS * 3 * 8,
        } == root["about"]  # fmt: skip
        assert ["kv.queued", "kv.handshake", "kv.posted", "kv.done"] == [span["name"] for span in phases]
        assert {"kv.pull"} == {span["parent"] for span in phases}
        assert root["start"] == phases[0]["start"] and phases[-1]["end"] <= root["end"]
        assert all(one["end"] == other["start"] for one, other in pairwise(phases))
        slack = 50_000_000  # two clocks
        assert before - slack <= root["start"] <= root["end"] <= after + slack


@needs_sdk
def test_the_span_of_a_request_that_failed_says_why(deployment):
    producer = deployment.engine("prefill", Shape())
    consumer = deployment.engine("decode", Shape(), spans=True)
    consumer.each(spans.collect)
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    producer.ask("force", "one")
    producer.step()
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), OURS, 0, TOKENS)
    until(lambda: consumer.failed, consumer)
    (found,) = consumer.each(spans.told)
    (root,) = [span for span in found if not span["parent"]]
    assert ("ERROR", "stale") == (root["status"], root["about"]["tensorway.cause"])
    assert "prefill" in root["why"]


@needs_sdk
def test_no_spans_are_told_unless_they_are_asked_for(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    consumer.each(spans.collect)
    hand_over(producer, consumer)
    assert [[]] == consumer.each(spans.told)


def test_a_mover_that_cannot_tell_is_refused_before_anything_is_opened(deployment):
    producer = deployment.engine("prefill", Shape())
    counts = []
    for _ in range(3):
        with pytest.raises(RankFailed, match="pip install opentelemetry-sdk"):
            producer.movers[0].call(spans.open_without_the_library, "prefill", Shape(), {"transport": "local"})
        counts.append(producer.movers[0].call(leftovers))
    assert counts[-1] <= counts[0], "files and threads"
