"""Configuration is refused with the key that is meant, never taken by halves."""

from __future__ import annotations

from typing import Literal

import attrs
import pytest

from tensorway.errors import OptionsInvalid
from tensorway.plugins.options import fitted, validated
from tensorway.types import NoOptions, Offer, ProbeResult


@attrs.frozen
class Options:
    num_threads: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    lane: Literal["tcp", "rdma"] = "tcp"
    devices: tuple[str, ...] = ()
    ratio: float | None = None


@attrs.frozen
class Required:
    path: str


def offer(options: type = Options) -> Offer:
    return Offer("nixl", "transport", "A test.", probe=lambda: ProbeResult.passed("yes"), options=options)


def refused(given: object, options: type = Options) -> OptionsInvalid:
    with pytest.raises(OptionsInvalid) as caught:
        validated(offer(options), given)
    return caught.value


def test_what_fits_becomes_an_instance_of_the_options_class():
    given = {"num_threads": 4, "lane": "rdma", "devices": ["mlx5_0"], "ratio": 0.5}
    assert Options(4, "rdma", ("mlx5_0",), 0.5) == validated(offer(), given)


def test_an_instance_passes_as_it_is():
    options = Options(num_threads=2)
    assert options is validated(offer(), options)


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    error = refused({"num_thread": 4})
    assert "It has no option 'num_thread'." == error.true
    assert "Did you mean 'num_threads'? It knows: devices, lane, num_threads, ratio." == error.to_do


def test_a_key_that_is_near_to_nothing_still_names_what_is_known():
    assert "It knows: devices, lane, num_threads, ratio." == refused({"zzz": 1}).to_do


def test_an_option_of_a_backend_without_options_is_refused():
    assert "Give none: it has no options." == refused({"a": 1}, NoOptions).to_do


@pytest.mark.parametrize("value", ["4", 4.5, None, [4], True])
def test_a_value_of_another_type_is_refused_and_named(value):
    error = refused({"num_threads": value})
    assert f"The option 'num_threads' is {value!r}: expected `int`" in error.true
    assert "Give 'num_threads' as int." == error.to_do


def test_a_word_that_is_not_among_the_choices_is_refused():
    assert "'lane' is 'pigeon': invalid enum value" in refused({"lane": "pigeon"}).true


def test_what_the_class_itself_refuses_is_told_in_its_words():
    assert "'num_threads' must be >= 1: 0." == refused({"num_threads": 0}).true


def test_an_option_without_default_that_is_absent_is_named():
    assert "The option 'path' has no default and was not given." == refused({}, Required).true


def test_something_that_is_no_mapping_is_refused():
    assert "They are a list." == refused([("num_threads", 1)]).true


@attrs.frozen
class Nested:
    parts: list[dict[str, object]] = attrs.field(factory=list)

    def __attrs_post_init__(self):
        for part in self.parts:
            fitted(Options, part, "Options were given to a part.", "See the page.")


def test_options_within_options_say_themselves_what_is_wrong_with_them():
    error = refused({"parts": [{"num_threads": 2}, {"num_treads": 2}]}, Nested)
    assert ("Options were given to a part.", "It has no option 'num_treads'.") == (error.asked, error.true)
    assert error.to_do.startswith("Did you mean 'num_threads'?")
    error = refused({"parts": [{"num_threads": 0}]}, Nested)
    assert "'num_threads' must be >= 1" in error.true and "See the page." == error.to_do
    assert Options(3) == fitted(Options, {"num_threads": 3}, "", "")


@attrs.frozen
class Private:
    secret: str = attrs.field(default="", repr=False)
    tiers: list[dict[str, object]] = attrs.field(factory=list, repr=False)


@pytest.mark.parametrize("given", [{"secret": 4242424242424242}, {"secret": ["hunter2"]}, {"tiers": "hunter2"}])
def test_a_value_that_no_report_shows_is_not_shown_when_it_is_refused(given):
    error = refused(given, Private)
    assert f"The option {next(iter(given))!r} is not shown: expected" in error.true
    assert "hunter2" not in str(error) and "4242" not in str(error)
