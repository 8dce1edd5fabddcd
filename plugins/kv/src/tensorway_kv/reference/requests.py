"""What an engine is asked, what it answers, and what it knows of a request in between.

May import attrs and the core's contract.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import attrs

from tensorway.kv import RequestView

#: `waiting`: for blocks. `handed`: its blocks are on their way. `computing`. `unsure`: it has computed on what may not
#: have arrived. `ending`: given up, and its blocks are still on their way.
Phase = Literal["waiting", "handed", "computing", "unsure", "ending"]


@attrs.frozen
class Request:
    """Continue a prompt."""

    #: Never that of another request of this engine.
    id: str
    tokens: tuple[int, ...]
    #: How many tokens are wanted.
    count: int = 1
    #: What another engine said of the same prompt.
    ticket: Mapping[str, Any] | None = None
    #: Requests of different salts share no blocks.
    salt: str = ""
    #: Whether another engine is to have the blocks.
    hand_over: bool = False


@attrs.frozen
class Outcome:
    """What became of a request."""

    id: str
    tokens: tuple[int, ...]
    #: For who goes on with it elsewhere.
    ticket: Mapping[str, Any] | None = None
    #: Whether it was given up.
    aborted: bool = False
    #: Of the prompt: tokens whose blocks were here, and that came from another engine.
    cached: int = 0
    handed: int = 0
    #: How many tokens were to come from another engine and did not.
    failed: int = 0
    #: Tokens that were computed here, some perhaps twice; how often it had to make room for others.
    computed: int = 0
    preempted: int = 0
    #: `hand_over`: from `reserve` to the step that says what became of it. `prefill`: from the first token that is
    #: computed here to the first one that is chosen. `total`.
    seconds: Mapping[str, float] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Running:
    """A request, and how far it has come."""

    request: Request
    view: RequestView
    #: The prompt, and what was chosen.
    tokens: list[int]
    names: list[bytes]
    promised: Mapping[str, Any] | None = None
    phase: Phase = "waiting"
    blocks: list[int] = attrs.field(factory=list)
    #: Tokens from the first on whose keys and values are in the blocks.
    computed: int = 0
    #: How many of the blocks are known by their names.
    named: int = 0
    reserved: bool = False
    #: Tokens that are to be there when its blocks have arrived; and, if it is unsure, a token chosen on that condition.
    expected: int = 0
    guess: int | None = None
    cached: int = 0
    handed: int = 0
    failed: int = 0
    computed_here: int = 0
    preempted: int = 0
    began: float = attrs.field(factory=time.monotonic)
    marks: dict[str, float] = attrs.field(factory=dict)

    @property
    def id(self) -> str:
        """Of the request."""
        return self.request.id

    @property
    def chosen(self) -> tuple[int, ...]:
        """The tokens that were chosen."""
        return tuple(self.tokens[len(self.request.tokens) :])

    def go_on_from(self, tokens: int) -> None:
        """So many are there. The last of all is computed in any case: it says what follows."""
        self.computed = min(tokens, len(self.tokens) - 1)

    def mark(self, what: str) -> None:
        """Something happens now, for the first time."""
        self.marks.setdefault(what, time.monotonic())

    def outcome(self, ticket: Mapping[str, Any] | None = None, *, aborted: bool = False) -> Outcome:
        """What is said of it in the end."""
        return Outcome(
            self.id, self.chosen, ticket, aborted, self.cached, self.handed, self.failed, self.computed_here,
            self.preempted, self._seconds(),
        )  # fmt: skip

    def _seconds(self) -> dict[str, float]:
        marks, found = self.marks, {"total": time.monotonic() - self.began}
        for name, first, last in (("hand_over", "reserved", "heard"), ("prefill", "computing", "chosen")):
            if first in marks and last in marks:
                found[name] = marks[last] - marks[first]
        return found
