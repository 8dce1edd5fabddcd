"""What a user may set on the connector `several`, and on each of its children.

May import attrs, and the core's errors and check of options.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, Literal

import attrs

from tensorway.errors import OptionsInvalid
from tensorway.plugins.options import fitted

#: More than anybody puts together; beyond that it is a mistake.
MOST_CHILDREN: Final = 16
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
_ASKED: Final = "Options were given to kv_connector 'several'."
_SEE: Final = "See docs/backends/several.md."


def _between(low: float, high: float) -> list[Callable[[Any, Any, Any], Any]]:
    return [attrs.validators.ge(low), attrs.validators.le(high)]


def _is_a_name(_options: object, _attribute: object, value: str) -> None:
    if not _NAME.fullmatch(value):
        raise ValueError(f"The name is {value!r}: letters, digits, `-`, `_` and `.` are possible, at most 64")


@attrs.frozen
class ChildOptions:
    """One of `children`."""

    #: What it is called in tickets, metrics, logs and below `path`; the same on all engines of a deployment.
    name: str = attrs.field(validator=_is_a_name)
    #: Which connector it is.
    backend: str
    #: Options of that connector.
    options: dict[str, object] = attrs.field(factory=dict, repr=False)
    #: Whether blocks may come from it; the order of children is the order in which they are asked.
    load: bool = True
    #: Which requests that have ended it is to keep or store: all, none, or those that no child before it keeps.
    save: Literal["always", "never", "otherwise"] = "always"
    #: Seconds that one try of it may take.
    deadline: float = attrs.field(default=10.0, validator=_between(0.01, 3600.0))
    #: How often one request tries it.
    tries: int = attrs.field(default=2, validator=_between(1, 100))
    #: Seconds that a request waits for it to know what it has, or to be there again, rather than ask the next.
    patience: float = attrs.field(default=1.0, validator=_between(0.0, 3600.0))


@attrs.frozen
class SeveralOptions:
    """Options of the connector `several`."""

    #: One mapping for each: `name`, `backend`, and what `ChildOptions` has besides.
    children: list[dict[str, object]] = attrs.field(factory=list, repr=False)
    #: Below it each child has its own place in the rendezvous, if its options do not name one.
    path: str = "/kv"
    #: Seconds that one request may take, whoever it tries.
    deadline: float = attrs.field(default=30.0, validator=_between(0.01, 3600.0))
    #: Exceptions of a child, one after the other and nothing good between them, after which it is out of use.
    faults: int = attrs.field(default=5, validator=_between(1, 1_000_000))

    def __attrs_post_init__(self) -> None:
        if self.children:  # to have none is refused when it is opened, so that it can be listed and asked about
            children_of(self)


def children_of(options: SeveralOptions) -> tuple[ChildOptions, ...]:
    """The children, in their order; raises `OptionsInvalid`."""
    if not 1 <= len(options.children) <= MOST_CHILDREN:
        true = f"There are {len(options.children)} children; from 1 to {MOST_CHILDREN} are possible."
        raise OptionsInvalid(_ASKED, true, "Give `children` as a list of mappings with `name` and `backend`.")
    found = []
    for number, given in enumerate(options.children, 1):
        which = repr(given["name"]) if isinstance(given.get("name"), str) else f"number {number}"
        asked = f"Options were given to child {which} of kv_connector 'several'."
        found.append(fitted(ChildOptions, given, asked, _SEE))
    _check_distinct(found)
    return tuple(found)


def _check_distinct(children: list[ChildOptions]) -> None:
    names = [child.name for child in children]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise OptionsInvalid(_ASKED, f"Two children are called {twice[0]!r}.", "Give each child a name of its own.")
    places = [(child.backend, child.options["path"]) for child in children if "path" in child.options]
    for child in children:
        if "path" in child.options and places.count((child.backend, child.options["path"])) > 1:
            true = f"Two children of backend {child.backend!r} have the path {child.options['path']!r}."
            raise OptionsInvalid(_ASKED, true, "Leave `path` out: each child has a place of its own below ours.")
