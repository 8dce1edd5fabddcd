"""Every error has three lines, travels between processes, and can be caught as what it is."""

from __future__ import annotations

import inspect
import pickle

import pytest

from tensorway import errors

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.TensorwayError)]


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_has_three_lines_and_survives_pickling(cls):
    error = pickle.loads(pickle.dumps(cls("asked", "true", "to do")))
    assert "asked\n  true\n  to do" == str(error)
    assert (cls, "asked", "true", "to do") == (type(error), error.asked, error.true, error.to_do)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_says_in_one_sentence_what_situation_it_is(cls):
    assert cls.__doc__.strip().endswith(".")


def test_errors_can_be_caught_as_the_builtin_that_callers_expect():
    assert issubclass(errors.BackendNotFound, LookupError)
    assert issubclass(errors.OptionsInvalid, ValueError)
    assert issubclass(errors.HostBusy, TimeoutError)


def test_words_of_a_stranger_are_shown_and_neither_obeyed_nor_taken_for_a_line_of_the_log():
    error = errors.RecordRefused("asked", "It said: \x1b]0;owned\x07\x9b31m\nWARNING forged \u202eno\udcff.", "to do")
    assert "asked\n  It said: \\x1b]0;owned\\x07\\x9b31m\n    WARNING forged \\u202eno\\udcff.\n  to do" == str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error) and "\x1b" not in error.true
    assert "asked\n  größer\n  to do" == str(errors.RecordRefused("asked", "größer", "to do"))
