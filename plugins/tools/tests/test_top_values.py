"""What is read of a page of metrics, whoever wrote it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import DescriptionInvalid
from tensorway.metrics import BUCKETS, Counters, Metric, exposition, vocabulary
from tensorway_tools.top.values import MOST, read

WORDS = vocabulary(Metric("jobs_total", "counter", ("peer",), "Jobs."), Metric("job_seconds", "seconds", (), "Times."))


@given(st.dictionaries(st.text(max_size=40), st.floats(0, 1e18, exclude_max=True), max_size=5))
def test_what_our_server_writes_is_read(values):
    counts, expected = Counters(WORDS), {}
    for peer, value in values.items():
        counts.add("jobs_total", value, peer=peer)
    for (name, labels), value in read(exposition(counts.samples(), WORDS)).items():
        expected[labels] = value
        assert "jobs_total" == name and [value] == [each for each in values.values() if each == value][:1]
    assert all(text.isascii() and text.isprintable() for ((_, text),) in expected)


def test_of_times_the_sum_and_the_number_are_read():
    counts = Counters(WORDS)
    for seconds in (0.001, *BUCKETS):
        counts.took("job_seconds", seconds)
    found = read(exposition(counts.samples(), WORDS))
    assert {("job_seconds_sum", ()), ("job_seconds_count", ())} == set(found)
    assert 1 + len(BUCKETS) == found["job_seconds_count", ()]


def test_others_are_passed_over_and_vllm_names_are_ours():
    text = 'python_info{a="b"} 1\n# HELP tensorway_x nothing\nvllm:tensorway_kv_leases{engine="0"} 3\n'
    assert {("kv_leases", (("engine", "0"),)): 3.0} == read(text)


@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_any_bytes_are_values_or_an_error_with_three_lines_that_a_terminal_bears(text):
    try:
        found = read(f"tensorway_{text}\n{text}")
        words = [word for _, labels in found for pair in labels for word in pair]
    except DescriptionInvalid as error:
        words = [error.asked, error.true, error.to_do]
    assert all(word.isascii() and word.isprintable() for word in words)


@pytest.mark.parametrize(
    "line",
    [
        "tensorway_a nan",
        "tensorway_a inf",
        "tensorway_a 1e308",
        "tensorway_a -1e18",
        "tensorway_a",
        'tensorway_a{b="c} 1',
        'tensorway_a{b="c"} 1 2 3',
        "tensorway_a 1e",
        "tensorway_a{" + ",".join(f'l{number}="x"' for number in range(40)) + "} 1",
    ],
)
def test_a_line_that_looks_like_ours_and_is_none_spoils_the_page(line):
    with pytest.raises(DescriptionInvalid):
        read(f"tensorway_fine 1\n{line}\n")


def test_a_page_has_so_many_values_and_no_more():
    rows = [f'tensorway_a{{b="{number}"}} 1' for number in range(MOST + 1)]
    assert MOST == len(read("\n".join(rows[:-1])))
    with pytest.raises(DescriptionInvalid):
        read("\n".join(rows))
