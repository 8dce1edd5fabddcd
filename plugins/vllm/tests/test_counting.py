"""What is told of counters between processes; needs no vLLM."""

from __future__ import annotations

import json
import random

import pytest

from tensorway.metrics import BUCKETS, Counters, Sample, vocabulary
from tensorway.metrics import Metric as Of
from tensorway_vllm.counting import Counting, folded, observations, packed, unpacked

WORDS = vocabulary(
    Of("moved_total", "counter", ("peer",), "Moved."),
    Of("open", "gauge", (), "Open now."),
    Of("took", "seconds", ("peer",), "How long."),
)


@pytest.fixture
def counts():
    return Counters(WORDS, backend="b", engine="e", rank="1")


def told(samples):
    return {sample.metric: sample.value for sample in samples}


def test_changes_are_told_once(counts):
    counting = Counting(counts.samples, WORDS)
    counts.add("moved_total", 3, peer="p")
    counts.set("open", 2)
    assert told(counting.changes()) == {"moved_total": 3, "open": 2}
    assert counting.changes() == []
    counts.add("moved_total", 4, peer="p")
    counts.add("moved_total", 1, peer="q")
    changed = counting.changes()
    assert [(dict(each.labels)["peer"], each.value) for each in changed] == [("p", 4), ("q", 1)]


def test_a_gauge_is_told_when_it_is_another_also_nothing(counts):
    counting = Counting(counts.samples, WORDS)
    counts.set("open", 2)
    counting.changes()
    counts.set("open", 0)
    assert told(counting.changes()) == {"open": 0}


def test_a_source_that_begins_again_is_counted_from_nothing():
    values = iter([[Sample("moved_total", (("peer", "p"),), 9)], [Sample("moved_total", (("peer", "p"),), 2)]])
    counting = Counting(lambda: next(values), WORDS)
    assert [told(counting.changes()) for _ in range(2)] == [{"moved_total": 9}, {"moved_total": 2}]


def test_labels_are_those_that_vllm_has_not_in_one_order(counts):
    counts.add("moved_total", peer="p")
    [sample] = Counting(counts.samples, WORDS).changes()
    assert sample.labels == (("peer", "p"), ("backend", "b"), ("child", ""), ("rank", "1"))


def test_words_of_a_backends_own_are_left_out():
    assert folded([Sample("its_own_total", (), 3)], WORDS) == []


def test_children_that_count_the_same_are_added_up_and_told_apart_by_their_names(counts):
    counts.add("moved_total", 2, peer="p")
    counts.took("took", 0.5, peer="p")
    [moved, took] = folded([*counts.samples(), *counts.samples()], WORDS)
    assert (moved.value, took.value, took.count, took.buckets[-1]) == (4, 1.0, 2, 2)
    one, other = (sample.labelled(child=name) for name in "ab" for sample in counts.samples()[:1])
    assert len(folded([one, other], WORDS)) == 2


def test_what_was_packed_is_the_same_after_json(counts):
    counts.add("moved_total", 2, peer="p")
    counts.took("took", 0.5, peer="p")
    samples = Counting(counts.samples, WORDS).changes()
    assert unpacked(json.loads(json.dumps(packed(samples)))) == samples


@pytest.mark.parametrize("seed", range(50))
def test_observations_have_the_buckets_the_number_and_the_sum_of_what_was_measured(counts, seed):
    numbers = random.Random(seed)
    most = numbers.choice([1e-4, 0.05, 8.0, 90.0])
    measured = [numbers.choice([numbers.random() * most, *BUCKETS[:3], 0.0]) for _ in range(numbers.randint(1, 9))]
    again = Counters(WORDS, backend="b", rank="1")
    for seconds in measured:
        counts.took("took", seconds, peer="p")
    [sample] = folded(counts.samples(), WORDS)
    for seconds in observations(sample):
        again.took("took", seconds, peer="p")
    [shown] = folded(again.samples(), WORDS)
    assert (shown.count, shown.buckets) == (sample.count, sample.buckets)
    assert shown.value == pytest.approx(sample.value, abs=1e-9)


def test_one_observation_is_what_was_measured(counts):
    counts.took("took", 0.0421, peer="p")
    assert observations(counts.samples()[0]) == pytest.approx([0.0421])


def test_a_source_that_takes_long_is_asked_less_often(counts, monkeypatch):
    now = [0.0]
    for clock in ("monotonic", "thread_time"):
        monkeypatch.setattr(f"tensorway_vllm.counting.time.{clock}", lambda: now[0])

    def slow():
        now[0] += 0.01
        return counts.samples()

    counting = Counting(slow, WORDS)
    counts.add("moved_total", peer="p")
    assert counting.changes()
    counts.add("moved_total", peer="p")
    assert counting.changes() == [], "a hundredth of the time at most"
    now[0] += 1.0
    assert told(counting.changes()) == {"moved_total": 1}
