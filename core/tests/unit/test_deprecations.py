"""Deprecations: warned of where they are met, an error when they are due, and none that is overdue or undocumented."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pluggy
import pytest

from tensorway import deprecations, hookspecs
from tensorway.deprecations import TensorwayDeprecationWarning, announce
from tensorway.errors import OfferInvalid, TensorwayError
from tensorway.plugins import slots

PAGE = Path(__file__).parents[3] / "docs" / "deprecations.md"


class TensorwayRemovedIn04Warning(TensorwayDeprecationWarning):
    removed_in = (0, 4)


#: Real in everything but that nothing of tensorway is deprecated by it.
OLD = TensorwayRemovedIn04Warning("The argument `old` is not used any more.", since=(0, 2), anchor="the-argument-old")


def problems(namespace, page, running):
    """What is wrong with the deprecations of a module, in a core of this version."""
    found = []
    anchors = {title.lower().replace("`", "").replace(" ", "-") for title in re.findall(r"^#+ (.+)$", page, re.M)}
    for name, value in namespace.items():
        if not isinstance(value, TensorwayDeprecationWarning):
            continue
        (major, minor), (since_major, since_minor) = value.removed_in, value.since
        if value.anchor not in anchors:
            found.append(f"{name} has no section #{value.anchor}")
        if running >= (major, minor, 1):
            found.append(f"{name} should be gone")
        if major == since_major and minor - since_minor < 2:
            found.append(f"{name} is warned of for less than two minor versions")
        if type(value).__name__ != f"TensorwayRemovedIn{major}{minor}Warning":
            found.append(f"{name} is of {type(value).__name__}, and goes in {major}.{minor}")
    return found


def test_every_deprecation_has_its_section_its_time_and_is_not_overdue():
    assert [] == problems(vars(deprecations), PAGE.read_text("utf-8"), deprecations.running())


def test_what_is_wrong_with_a_deprecation_is_seen():
    class TensorwayRemovedIn03Warning(TensorwayDeprecationWarning):
        removed_in = (0, 3)

    page = "# Deprecations\n\n### The argument `old`\n"
    short = TensorwayRemovedIn03Warning("x", (0, 2), "nowhere")
    assert [] == problems({"OLD": OLD}, page, (0, 4, 0))
    assert ["OLD should be gone"] == problems({"OLD": OLD}, page, (0, 4, 1))
    assert ["OLD has no section #the-argument-old"] == problems({"OLD": OLD}, "# Deprecations\n", (0, 2, 0))
    assert ["S has no section #nowhere", "S is warned of for less than two minor versions"] == problems(
        {"S": short}, page, (0, 2, 5)
    )


@pytest.mark.parametrize("version", ["0.2.0", "0.3.7"])
def test_who_calls_it_is_warned_with_his_own_line(monkeypatch, version):
    monkeypatch.setattr("tensorway.__version__", version)

    def function(old=None):
        announce(OLD, "A function was called.")

    with pytest.warns(TensorwayRemovedIn04Warning, match=r"error from tensorway 0\.4\.0 on.*#the-argument-old") as seen:
        function(old=1)
    assert __file__ == seen[0].filename


@pytest.mark.parametrize("version", ["0.4.0", "0.4.0rc1", "0.4.0.dev1+g1a2b3c", "1.0.0"])
def test_when_it_is_due_it_is_an_error(monkeypatch, version):
    monkeypatch.setattr("tensorway.__version__", version)
    with pytest.raises(TensorwayError) as caught:
        announce(OLD, "A function was called.")
    assert (
        "A function was called.\n"
        "  The argument `old` is not used any more.\n"
        "  See docs/deprecations.md#the-argument-old, or stay with a tensorway below 0.4."
    ) == str(caught.value)


def plugin(ctx, old):
    """A hook of a plugin that still has the argument."""


def other(ctx):
    """One that has not."""


@pytest.fixture(params=["warn_on_impl", "warn_on_impl_args"])
def deprecated(request, monkeypatch):
    """The specification of `observer`, with an argument or the whole hook deprecated."""

    def observer(ctx, old):
        """As it would be specified."""

    given = OLD if request.param == "warn_on_impl" else {"old": OLD}
    specification = pluggy.HookspecMarker(hookspecs.PROJECT)(**{request.param: given})(observer)
    monkeypatch.setattr(hookspecs, "observer", specification)
    return request.param


def test_the_host_warns_where_it_meets_an_implementation(deprecated):
    with pytest.warns(TensorwayRemovedIn04Warning, match="the-argument-old") as seen:
        assert plugin is slots.check_hook(plugin, "observer")
    assert (__file__, plugin.__code__.co_firstlineno) == (seen[0].filename, seen[0].lineno)


def test_who_does_not_use_the_argument_is_not_warned(deprecated):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        slots.check_hook(other, "observer")
    assert (1 if deprecated == "warn_on_impl" else 0) == len(seen)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_host_refuses_an_implementation_of_what_is_due(deprecated, monkeypatch):
    monkeypatch.setattr("tensorway.__version__", "0.4.0")
    with pytest.raises(OfferInvalid, match="the-argument-old"):
        slots.check_hook(plugin, "observer")
