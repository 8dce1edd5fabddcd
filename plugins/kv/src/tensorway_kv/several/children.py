"""The children of one side: made in their order, called so that what one raises is its own failure, closed together.

May import the core and this package's options. A child that raises again and again, with nothing good between, is out
of use: nobody calls it any more, and the log says so once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Generic, TypeVar

import attrs

import tensorway
from tensorway._logging import logger
from tensorway.errors import BackendUnavailable, OptionsInvalid, TensorwayError, Unsupported
from tensorway.kv import Capabilities, KVContext, Mover, Planner
from tensorway.metrics import Sample
from tensorway_kv.several.options import ChildOptions, SeveralOptions, children_of

_log = logger("kv")
_Side = TypeVar("_Side", Planner, Mover)
_Found = TypeVar("_Found")
#: Between the name of a child and what it says itself of a source.
_BELOW: Final = "/"


class Child(Generic[_Side]):
    """One connector, on the side that we are."""

    def __init__(self, options: ChildOptions, side: _Side, faults: int) -> None:
        self.options, self.name = options, options.name
        self.side: _Side = side
        #: Whether nobody calls it any more, but to close it.
        self.out = False
        self._faults, self._most = 0, faults

    def call(self, default: _Found, function: Callable[..., _Found], *arguments: Any, **more: Any) -> _Found:
        """What it answers; `default` if it is out of use, raises, or answers with something else than that is."""
        if self.out:
            return default
        try:
            found = function(*arguments, **more)
            if not isinstance(found, type(default)):
                raise TypeError(f"{type(found).__name__} was returned, and {type(default).__name__} was asked for")
        except Exception as error:  # whatever a child raises is its own failure, and no request's beside it
            self.fault(getattr(function, "__name__", "a call"), error)
            return default
        return found

    def does(self, function: Callable[..., None], *arguments: Any) -> bool:
        """Whether it did what it was asked to."""

        def asked() -> bool:
            function(*arguments)
            return True

        asked.__name__ = getattr(function, "__name__", "a call")
        return self.call(False, asked)

    def listed(self, function: Callable[[], Sequence[_Found]]) -> list[_Found]:
        """Everything that it answers with; nothing if it is out of use or raises."""

        def asked() -> list[_Found]:
            return list(function())

        asked.__name__ = getattr(function, "__name__", "a call")
        return self.call([], asked)

    def well(self) -> None:
        """Something has ended as it should: what it raised before does not count."""
        self._faults = 0

    def take_out(self, why: str, *, told: bool = False) -> None:
        """Use it no more. `told`: the other side has said so, and why."""
        if not self.out:
            self.out = True
            level = logging.INFO if told else logging.ERROR
            _log.log(level, "The connector %s (%s) is out of use: %s.", self.name, self.options.backend, why)

    def fault(self, what: str, error: Exception) -> None:
        """It has raised."""
        self._faults += 1
        _log.warning("The connector %s (%s) raised in %s: %s", self.name, self.options.backend, what, error)
        _log.debug("It was raised here.", exc_info=error)
        if self._faults >= self._most:
            self.take_out(f"it has raised {self._faults} times with nothing good between")


def opened(options: SeveralOptions, context: KVContext, kind: type[_Side]) -> list[Child[_Side]]:
    """All children, in their order; what was opened is closed if one cannot be."""
    children, until = children_of(options), time.monotonic() + context.deadline
    made: list[Child[_Side]] = []
    try:
        for child in children:
            left = max(0.001, until - time.monotonic())
            side = _made(child, attrs.evolve(context, deadline=left), options.path)
            made.append(Child(child, side, options.faults))
            _check(child, side)
    except BaseException:
        close(made, 5.0)
        raise
    return made


def _made(child: ChildOptions, context: KVContext, path: str) -> Any:
    asked = f"Child {child.name!r} of kv_connector 'several' was to be opened, as {child.backend!r}."
    try:
        options = {**_place(child, path), **child.options}
        return tensorway.create("kv_connector", child.backend, options, context)
    except OptionsInvalid as error:
        raise OptionsInvalid(asked, f"{error.asked} {error.true}", error.to_do) from error
    except TensorwayError as error:
        raise BackendUnavailable(asked, f"{error.asked} {error.true}", error.to_do) from error


def _place(child: ChildOptions, path: str) -> dict[str, object]:
    """A place of its own in the rendezvous, if it has an option that says where."""
    winner = tensorway.decide("kv_connector", child.backend).winner
    if winner is None or winner.offer is None or "path" not in attrs.fields_dict(winner.offer.options):
        return {}
    return {"path": f"{path}/{child.name}"}


def _check(child: ChildOptions, side: object) -> None:
    if not isinstance(getattr(side, "capabilities", None), Capabilities):
        asked = f"Child {child.name!r} of kv_connector 'several' was opened, as {child.backend!r}."
        true = f"It made a {type(side).__name__}, which does not say what it can do."
        raise BackendUnavailable(asked, true, "Compare it with tensorway.kv.Planner and tensorway.kv.Mover.")


def close(children: Sequence[Child[_Side]], deadline: float) -> list[tuple[Child[_Side], Exception]]:
    """Close all of them in one time, of which each has its share; who raised, and what."""
    until, failed = time.monotonic() + deadline, []
    for number, child in enumerate(children):
        share = max(0.0, until - time.monotonic()) / (len(children) - number)
        try:
            child.side.close(share)
        except Exception as error:  # the others are closed all the same
            _log.warning(
                "The connector %s (%s) raised when it was closed: %s", child.name, child.options.backend, error
            )
            failed.append((child, error))
    return failed


def together(capabilities: Iterable[Capabilities]) -> Capabilities:
    """What can be done if one of them can; pages must be where all of them can reach them."""
    found = list(capabilities)
    return Capabilities(
        pull=any(one.pull for one in found),
        push=any(one.push for one in found),
        layerwise=any(one.layerwise for one in found),
        bidirectional=any(one.bidirectional for one in found),
        by_content=any(one.by_content for one in found),
        media=frozenset.intersection(*(frozenset(one.media) for one in found)),
    )


def check_layers(capabilities: Capabilities) -> None:
    """Raise `Unsupported` unless one of them streams."""
    if not capabilities.layerwise:
        asked, true = "Layers of a request were to be moved one by one.", "None of the connectors does that."
        raise Unsupported(asked, true, "Ask its capabilities first.")


def below(name: str, source: str) -> str:
    """A source as it is told further up: the child's name, and what the child says itself."""
    return f"{name}{_BELOW}{source}" if source else name


def parted(source: str) -> tuple[str, str]:
    """The child of a source, and what is the child's own."""
    name, _, own = source.partition(_BELOW)
    return name, own


def labelled(name: str, sample: Sample) -> Sample:
    """A child's value with the child's name."""
    labels = dict(sample.labels)
    if "child" not in labels:
        return sample.labelled(child=name)
    return attrs.evolve(sample, labels=tuple({**labels, "child": below(name, labels["child"])}.items()))


def samples(children: Iterable[Child[_Side]]) -> list[Sample]:
    """The values of all children."""
    found: list[Sample] = []
    for child in children:
        found += [labelled(child.name, one) for one in child.listed(child.side.statistics)]
    return found
