"""The mover of `several`: gives each child its part of a plan, and says whose every result is.

May import the core and this package's children and plans. One thread uses it, and only `flush`, `close` and
`before_layer` wait. A child that is out of use is closed on a thread of its own, for that may take long; when it is
closed, nothing of it touches a page any more, and the planner hears so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final, Literal

import attrs

from tensorway._logging import logger
from tensorway.errors import Closed, DeadlineExceeded, DescriptionInvalid
from tensorway.kv import KVContext, Mover, Result
from tensorway.metrics import Sample
from tensorway_kv.several import plans
from tensorway_kv.several.children import Child, below, check_layers, close, opened, samples, together
from tensorway_kv.several.options import SeveralOptions

_log = logger("kv")
#: Seconds that a child which is out of use may take to be closed.
_CLOSING: Final = 30.0


class _Closing:
    """A child that is being closed."""

    def __init__(self, child: Child[Mover]) -> None:
        self.child, self.said = child, False
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._close, name=f"tensorway-kv-end-{child.name}", daemon=True)
        self._thread.start()

    def _close(self) -> None:
        failed = close([self.child], _CLOSING)
        self.error = failed[0][1] if failed else None

    def closed(self, deadline: float = 0.0) -> bool:
        """Whether its pages are safe, after waiting so long."""
        self._thread.join(deadline)
        return not self._thread.is_alive() and self.error is None


class SeveralMover:
    """See `tensorway.kv.contract.LayerwiseMover`."""

    def __init__(self, options: SeveralOptions, context: KVContext) -> None:
        self._children: list[Child[Mover]] = opened(options, context, Mover)  # type: ignore[type-abstract]
        self._by_name = {child.name: child for child in self._children}
        self.capabilities = together(child.side.capabilities for child in self._children)
        #: What children have been given blocks for: by request, each child and what it calls the request.
        self._begun: dict[str, set[tuple[str, str]]] = {}
        self._requests: dict[tuple[str, str], str] = {}
        #: Requests that ended since the last plan, of which the planner has not decided yet; those that the engine
        #: computes with layer by layer, and of these what the planner has not been told.
        self._undecided: set[str] = set()
        self._computed: set[str] = set()
        self._untold: list[str] = []
        self._closings: dict[str, _Closing] = {}
        self._closed = False

    # -- what the planner says

    def submit(self, plan: bytes) -> None:
        """Give each child its part; raises only for a plan that is none.

        A child that cannot carry its part out is out of use at once: what it has not done, such as telling late readers
        that they are late, cannot be made up for.
        """
        self._check()
        orders = plans.decode(plan)
        if strangers := {*orders.plans, *orders.ends, *(one.child for one in orders.begun)} - set(self._by_name):
            asked, true = "A step's plan was given to a mover.", f"It names child {min(strangers)}, which is not here."
            raise DescriptionInvalid(asked, true, "Give the planner and all movers the same children.")
        self._computed &= self._begun.keys()
        self._undecided.clear()
        for one in orders.begun:
            self._requests[one.child, one.inner] = one.request
            self._begun.setdefault(one.request, set()).add((one.child, one.inner))
        for child in self._children:
            if not child.out and not child.does(child.side.submit, orders.plans.get(child.name, b"")):
                child.take_out("it did not carry out a plan")
        for name in orders.ends:
            self._by_name[name].take_out("the planner says so", told=True)
        self._close_those_out()

    def cancel(self, request: str) -> None:
        """Give up what any child has under way for it."""
        self._check()
        for name, inner in list(self._begun.get(request, ())):
            self._by_name[name].does(self._by_name[name].side.cancel, inner)

    def poll(self) -> list[Result]:
        """What has ended, with the name of the child that says it; and which children are closed."""
        self._check()
        found = [self._says("computed", request) for request in self._untold]
        self._untold = []
        for child in self._children:
            for result in child.listed(child.side.poll):
                if result.what == "received":
                    self._over(child.name, result.request)
                found.append(attrs.evolve(result, source=below(child.name, result.source)))
        self._close_those_out()
        for name, closing in self._closings.items():
            if not closing.said and closing.closed():
                closing.said = True
                for key in [key for key in self._requests if key[0] == name]:
                    self._over(*key)
                found.append(self._says("ended", name))
        return found

    def flush(self, deadline: float) -> None:
        """Wait for all children; raises `DeadlineExceeded` if the pages of one of them are not known to be safe."""
        self._check()
        until, late = time.monotonic() + deadline, [*self._wait("flush", deadline)]
        for name, closing in self._closings.items():
            if not closing.closed(max(0.0, until - time.monotonic())):
                late.append(f"{name} is not closed: {closing.error or 'it takes long'}")
        if late:
            to_do = "Leave these pages alone until the mover has said that their requests failed."
            raise DeadlineExceeded("Pages were to be overwritten.", f"They may be in use: {'; '.join(late)}.", to_do)

    # -- layer by layer

    def before_layer(self, layer: int, deadline: float) -> None:
        """Wait for the children that stream; raises `DeadlineExceeded` if one is late."""
        self._check()
        check_layers(self.capabilities)
        computed = (self._begun.keys() | self._undecided) - self._computed
        self._computed |= computed
        self._untold += computed
        if late := self._wait("before_layer", deadline, layer):
            asked, true = f"Layer {layer} was to be there.", f"It is not: {'; '.join(late)}."
            raise DeadlineExceeded(asked, true, "Compute its requests anew.")

    def after_layer(self, layer: int) -> None:
        """Tell the children that stream."""
        self._check()
        check_layers(self.capabilities)
        for child in self._children:
            after: Callable[[int], None] | None = getattr(child.side, "after_layer", None)
            if after is not None:
                child.does(after, layer)

    def _wait(self, name: str, deadline: float, *arguments: Any) -> list[str]:
        """Let each child that can wait, in one time; who was late, and who raised something else instead."""
        until, late = time.monotonic() + deadline, []
        for child in self._children:
            waits = getattr(child.side, name, None)
            if waits is None or child.out:
                continue
            try:
                waits(*arguments, max(0.0, until - time.monotonic()))
            except DeadlineExceeded as error:  # no failure of the child's: it was asked how long it takes
                late.append(f"{child.name}: {error.true}")
            except Exception as error:
                child.fault(name, error)
                late.append(f"{child.name} raised {type(error).__name__}")
        self._close_those_out()
        return late

    # -- all of it

    def statistics(self) -> list[Sample]:
        """Values of all children with the label `child`."""
        return samples(self._children)

    def close(self, deadline: float = 5.0) -> None:
        """Close all children, in one time; raises what one of them raised, for its pages may not be safe."""
        if self._closed:
            return
        self._closed = True
        until = time.monotonic() + deadline
        failed = close([child for child in self._children if child.name not in self._closings], deadline)
        for closing in self._closings.values():
            if not closing.closed(max(0.0, until - time.monotonic())):
                late = DeadlineExceeded("A mover was to be closed.", "A child takes longer.", "End the process.")
                failed.append((closing.child, closing.error or late))
        if failed:
            raise failed[0][1]

    # -- inside

    def _over(self, child: str, inner: str) -> None:
        request = self._requests.pop((child, inner), None)
        if request is not None:
            self._undecided.add(request)
            self._begun[request].discard((child, inner))
            if not self._begun[request]:
                del self._begun[request]

    @staticmethod
    def _says(what: Literal["ended", "computed"], name: str) -> Result:
        return Result("", "heard", proof=plans.encode(plans.Said(plans.VERSION, what, name)))

    def _close_those_out(self) -> None:
        for child in self._children:
            if child.out and child.name not in self._closings:
                self._closings[child.name] = _Closing(child)

    def _check(self) -> None:
        if self._closed:
            raise Closed("A mover of KV blocks was used.", "It is closed.", "Open another.")
