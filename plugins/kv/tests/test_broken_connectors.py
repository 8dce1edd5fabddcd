"""The kit's suite of connectors says so if one is broken: each test of it that matters is seen to fail."""

from __future__ import annotations

import inspect

import pytest

from tensorway.testing import ConnectorSuite
from tensorway.testing import connector_engines as engines
from tensorway.testing.ranks import RankFailed
from tensorway_kv.testing import broken

WRONG, LATE = "bytes are wrong", "received .*, failed .*, released"
KILLED = "test_a_producer_that_is_killed_costs_its_request_only[before it is reached]"
AFTER = "bytes are wrong|after their request had ended"
#: What is broken, a test that sees it, and what that says.
BREAKS = [
    ("capabilities_differ", "test_the_host_constructs_both_sides_and_each_is_what_it_says", "differ in push"),
    ("hides_layers", "test_layers_are_refused_unless_they_are_declared", "AttributeError"),
    ("a_byte_beside", "test_every_byte_arrives_and_no_other_is_written", WRONG),
    ("a_byte_missing", "test_every_byte_arrives_and_no_other_is_written", WRONG),
    ("never_released", "test_every_byte_arrives_and_no_other_is_written", LATE),
    ("whole_blocks_only", "test_only_what_is_missing_is_written[8]", WRONG),
    ("never_released", "test_who_lacks_nothing_says_so_and_nothing_moves", LATE),
    ("twice_received", "test_several_at_once_are_told_apart", "assert"),
    ("twice_released", "test_several_at_once_are_told_apart", "times"),
    ("always_busy", "test_several_at_once_are_told_apart", "a planner is busy"),
    ("lookups_fetch", "test_a_lookup_changes_nothing_and_may_be_asked_again", "assert"),
    ("strangers_are_believed", "test_a_ticket_that_is_none_is_a_miss", "by the ticket"),
    ("tickets_raise", "test_a_ticket_that_is_none_is_a_miss", "TypeError|KeyError"),
    ("strangers_are_believed", "test_a_ticket_is_one_requests", "Match"),
    ("strangers_are_believed", "test_hashes_find_blocks_only_if_that_is_declared", "Match"),
    ("never_released", "test_a_request_that_is_cancelled_ends_once[looked up]", LATE),
    ("writes_later", "test_a_request_that_is_cancelled_ends_once[reserved]", AFTER),
    ("a_byte_missing", "test_what_the_producer_takes_back_is_not_received_afterwards", WRONG),
    ("twice_released", "test_an_engine_that_forgets_keeps_nothing", "times"),
    ("polls_raise", KILLED, "this is raised"),
    ("unknown_causes", KILLED, "no cause of the vocabulary"),
    ("writes_later", KILLED, AFTER),
    ("never_released", "test_a_consumer_that_is_killed_gives_blocks_back", LATE),
    ("any_plan_is_taken", "test_a_plan_that_is_damaged_is_refused_and_the_next_one_is_not", "was taken"),
    ("plans_crash", "test_a_plan_that_is_damaged_is_refused_and_the_next_one_is_not", "raised KeyError"),
    ("results_of_nobody_raise", "test_results_of_nobody_change_nothing", "KeyError"),
    ("words_of_its_own", "test_statistics_are_values_of_the_vocabulary", "no value of the vocabulary"),
    ("events_of_nothing", "test_events_say_what_was_stored_before_it_is_removed", "was not stored"),
    ("forgets_that_it_is_closed", "test_closed_twice_while_a_request_is_under_way", "it is closed"),
    ("a_file_of_each", "test_nothing_is_left_of_requests", "threads and files"),
    ("waits_for_no_layer", "test_a_layer_that_was_waited_for_is_here", "False"),
    ("a_byte_missing", "test_the_second_turn_reads_back_what_the_first_has_handed_over", WRONG),
    ("keeps_when_closed", "test_who_is_closed_refuses", "keep"),
]


class Broken(ConnectorSuite):
    """Not collected: its tests are called here."""

    name = "handover"
    options = {"transport": "local", "lease": 3.0, "deadline": 3.0, "presence": 10.0}
    any_geometry = True


@pytest.fixture(scope="module")
def suite():
    """Its processes are shared, as those of a suite are."""
    yield Broken()
    Broken.teardown_class()


@pytest.fixture
def world(suite, tmp_path, monkeypatch, request):
    monkeypatch.setattr(engines, "PATIENCE", 6.0)
    monkeypatch.setattr(engines.until, "__kwdefaults__", {"seconds": 6.0})
    monkeypatch.setattr(Broken, "around", f"{broken.__name__}:{request.param}")
    made = inspect.unwrap(ConnectorSuite.world)(suite, tmp_path, monkeypatch)
    yield next(made)
    with pytest.raises(StopIteration):
        next(made)


def run(suite, world, name, case):
    """One test of the suite, with the fixtures that it asks for."""
    given = inspect.signature(getattr(suite, name)).parameters
    values = {"world": world, "have": 8, "when": case}
    if "pair" in given:
        values["pair"] = inspect.unwrap(ConnectorSuite.pair)(suite, world)
    getattr(suite, name)(**{each: values[each] for each in given})


@pytest.mark.parametrize(("world", "test", "says"), BREAKS, indirect=["world"])
def test_it_is_said(suite, world, test, says):
    name, _, case = test.rstrip("]").partition("[")
    with pytest.raises((AssertionError, RankFailed), match=says):
        run(suite, world, name, case)


def test_every_test_is_broken_once_or_needs_what_handover_has_not():
    tests = {name for name in dir(ConnectorSuite) if name.startswith("test_")}
    broken_once = {test.partition("[")[0] for _, test, _ in BREAKS}
    assert tests - broken_once == {
        "test_no_test_of_the_suite_is_replaced_without_a_reason",
        "test_engines_that_look_otherwise_move_every_byte_or_refuse",  # judged by what the equal ones are judged by
        "test_flush_returns_when_nothing_is_under_way",
        "test_layers_are_sent_as_they_are_computed",  # only with staging memory
        "test_nothing_is_left_of_engines",
    }
