"""The plugin host: knows every backend that is installed, loads what is asked for, remembers what it learned.

Room `plugins`; may import the ground and its own room. One per process (`tensorway.plugins.host()`); threads may
share it. pluggy holds one lazy stub per declared backend and serves when offers are collected; what `create` returns
never comes back here.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Final

import pluggy

import tensorway
from tensorway import _logging, hookspecs
from tensorway.errors import (
    BackendConflict,
    BackendNotFound,
    BackendUnavailable,
    OfferInvalid,
    PluginDefect,
    SettingInvalid,
    TensorwayError,
)
from tensorway.hookspecs import HOOKS
from tensorway.plugins import options as option_values
from tensorway.plugins import scan
from tensorway.plugins.scan import Complaint, Declaration, Scan, canonical
from tensorway.plugins.select import AUTO, Candidate, Decision, Request, decide
from tensorway.plugins.slots import Record, Slot, SlotState
from tensorway.settings import Settings
from tensorway.types import HookContext, Offer

#: The dist of an offer that was registered in this process.
IN_PROCESS: Final = "in-process"
#: The core's own dist: what it offers is there unless it is denied by name.
CORE: Final = "tensorway"

_log = _logging.logger("plugins")


class Host:
    """Every backend of every kind, by `(kind, name@dist)`."""

    def __init__(self, found: Scan, settings: Settings) -> None:
        self.settings = settings
        #: Metadata that could not be used.
        self.complaints: tuple[Complaint, ...] = found.complaints
        #: What dists bring for the command line, which loads it itself.
        self.commands: tuple[Declaration, ...] = found.commands
        self.demos: tuple[Declaration, ...] = found.demos
        self.offload_commands: tuple[Declaration, ...] = found.offload_commands
        self.benches: tuple[Declaration, ...] = found.benches
        self.context = HookContext(api=hookspecs.API, core_version=tensorway.__version__)
        self._slots: dict[tuple[str, str], Slot] = {}
        self._lock = threading.RLock()
        # Apart from the one above: importing a plugin can take long, and listing must not wait for it.
        self._load_lock = threading.RLock()
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        for declaration in found.declarations:
            self._add(declaration)
        self._apply_lists()
        self._complain_about_conflicts()

    @property
    def manager(self) -> pluggy.PluginManager:
        """pluggy's manager with the lazy stubs, for tools that watch hook calls."""
        return self._manager

    def slots(self, kind: str | None = None) -> tuple[Slot, ...]:
        """Every slot, or those of one kind, in a fixed order. Loads nothing."""
        if kind is not None:
            _known_kind(kind)
        with self._lock:
            return tuple(slot for slot in self._slots.values() if kind in (None, slot.declaration.kind))

    def register(self, offer: Offer) -> Slot:
        """Offer a backend from this process, without a dist and without metadata."""
        given: object = offer
        if not isinstance(given, Offer):
            asked, true = "An offer was registered in this process.", f"It is of type {type(given).__name__}."
            raise OfferInvalid(asked, true, "Give a tensorway.Offer.")
        _known_kind(offer.kind)
        declaration = Declaration(offer.kind, offer.name, "", IN_PROCESS, self.context.core_version, api=hookspecs.API)
        with self._lock:
            if (offer.kind, declaration.label) in self._slots:
                raise BackendConflict(
                    f"{offer.kind} {offer.name!r} was registered in this process.",
                    "One of this name has been registered already.",
                    "Choose another name, or use tensorway.plugins.isolated() in tests.",
                )
            slot = self._add(declaration)
            slot.offer, slot.state = offer, SlotState.LOADABLE
        return slot

    def registered(self) -> tuple[Offer, ...]:
        """What `register` was given, so that a refreshed host can be given it again."""
        return tuple(slot.offer for slot in self.slots() if slot.declaration.dist == IN_PROCESS and slot.offer)

    def offers(self, kind: str) -> tuple[Offer, ...]:
        """Load every plugin of one kind and return the offers of those that load."""
        _known_kind(kind)
        collected: list[Offer | None] = getattr(self._manager.hook, kind)(ctx=self.context)
        return tuple(sorted((offer for offer in collected if offer), key=lambda offer: offer.name))

    def decide(
        self, kind: str, name: str = AUTO, *, device: str = "", needs: Iterable[str] = (), probe_all: bool = False
    ) -> Decision:
        """Say who wins and why the others lose; load what is asked for, probe as little as that needs (or all)."""
        _known_kind(kind)
        request = Request.parse(kind, name, device, frozenset(needs))
        if request.name == AUTO or probe_all:
            self.offers(kind)
        else:
            for slot in self.slots(kind):
                if slot.declaration.name == request.name and request.dist in ("", slot.declaration.dist):
                    slot.load(self.context, self.settings.probe_timeout)
        if probe_all:
            self.probe_all(kind)
        while True:
            decision = decide(request, [_candidate(slot) for slot in self.slots(kind)])
            if decision.ask_next is None:
                return decision
            self._slots[kind, decision.ask_next.label].probe(self.settings.probe_timeout)

    def create(
        self,
        kind: str,
        name: str = AUTO,
        options: Mapping[str, object] | object | None = None,
        context: object = None,
        *,
        device: str = "",
        needs: Iterable[str] = (),
    ) -> Any:
        """Construct a backend: the one that is named, or for `auto` the best that is usable here.

        A name never falls back to another backend. `auto` does, and says so once.
        """
        decision = self.decide(kind, name, device=device, needs=needs)
        if decision.winner is None:
            raise self.refusal(decision)
        slot = self._slots[kind, decision.winner.label]
        assert slot.offer is not None, "a winner has an offer"
        values = option_values.validated(slot.offer, {} if options is None else options)
        if decision.request.name == AUTO:
            self._say_fallback(decision)
        try:
            return slot.construct(values, context)
        except (KeyboardInterrupt, TensorwayError):
            raise
        except BaseException as error:  # SystemExit, too: a backend does not end the process that asks for it
            raise BackendUnavailable(
                f"{kind} {slot.label} was to be constructed.",
                f"Its factory raised {type(error).__name__}: {error}",
                "Mend what it names and construct again; the traceback is that of the exception's __cause__.",
            ) from error

    def named(self, name: str, kind: str | None = None) -> list[Slot]:
        """The slots called `name` or `name@dist`, of one kind or of every.

        Raises `BackendNotFound` when there is none.
        """
        bare, _, dist = name.partition("@")
        slots = [
            slot
            for slot in self.slots(kind)
            if slot.declaration.name == bare and (not dist or slot.declaration.dist == canonical(dist))
        ]
        if not slots:
            raise self._not_found(f"{kind or 'A backend called'} {name!r} was asked for.", bare, kind)
        return slots

    def examine(self, slot: Slot) -> None:
        """Load and probe one slot; what goes wrong is in its record."""
        slot.load(self.context, self.settings.probe_timeout)
        slot.probe(self.settings.probe_timeout)

    def probe_all(self, kind: str | None = None) -> None:
        """Load and probe every slot (of one kind), several at a time: each waits for a process, not for a processor."""
        slots = self.slots(kind)
        for slot in slots:  # imports are serial anyway, and here nobody waits for a lock
            slot.load(self.context, self.settings.probe_timeout)
        with ThreadPoolExecutor(max_workers=4, thread_name_prefix="tensorway-probe") as pool:
            # `map` gives back what was raised: in strict mode the first broken plugin ends this.
            for _ in pool.map(self.examine, slots):
                pass

    def refusal(self, decision: Decision) -> BackendNotFound | BackendConflict | BackendUnavailable:
        """The error for a decision without a winner."""
        request = decision.request
        asked = f"{request} was requested."
        if request.name == AUTO:
            return self._nothing_usable(decision, asked)
        try:
            slots = self.named(request.label, request.kind)
        except BackendNotFound as error:
            return error
        if len([slot for slot in slots if slot.record is None]) > 1:
            labels = ", ".join(slot.label for slot in slots)
            return BackendConflict(
                asked, f"{len(slots)} dists offer this name: {labels}.", "Ask for one of them by name@dist."
            )
        slot = next((slot for slot in slots if slot.record is None), slots[0])
        loser = next(loser for loser in decision.losers if loser.candidate.label == slot.label)
        usable = [
            other.declaration.name
            for other in self.slots(request.kind)
            if other.state in (SlotState.USABLE, SlotState.CONSTRUCTED) and other is not slot
        ]
        to_do = loser.remedy or f"tensorway why {request.kind} {request.name}"
        if usable:
            to_do = f"{to_do.removesuffix('.')}, or choose one of: {', '.join(usable)}."
        return BackendUnavailable(asked, f"{_whence(slot.declaration)}, but {loser.reason}.", to_do)

    def _add(self, declaration: Declaration) -> Slot:
        slot = Slot(declaration, on_record=self._on_record, load_lock=self._load_lock)
        self._slots[declaration.kind, declaration.label] = slot
        if declaration.value:
            slot.check_api()
        # A real function in the instance's __dict__: pluggy 1.7 does not see hooks that come from __getattr__.
        stub = SimpleNamespace(**{declaration.kind: hookspecs.hookimpl(self._lazy(slot))})
        self._manager.register(stub, name=f"{declaration.kind}:{declaration.label}")
        return slot

    def _lazy(self, slot: Slot) -> Any:
        def load_offer(ctx: HookContext) -> Offer | None:
            return slot.load(ctx, self.settings.probe_timeout)

        return load_offer

    def left_out(self, row: Declaration) -> str:
        """Why TENSORWAY_PLUGINS leaves a backend, a command or a demo's part out; empty if it does not."""
        if any(_selects(item, row) for item in self.settings.deny):
            return "TENSORWAY_PLUGINS leaves it out (denied)"
        allow = self.settings.allow
        if allow and row.dist != CORE and not any(_selects(item, row) for item in allow):
            return "TENSORWAY_PLUGINS leaves it out (not among the allowed)"
        return ""

    def _apply_lists(self) -> None:
        for_people = (*self.commands, *self.demos, *self.offload_commands, *self.benches)
        rows = [*(slot.declaration for slot in self._slots.values()), *for_people]
        for item in self.settings.allow:
            if not any(_selects(item, row) for row in rows):
                names = sorted({row.name for row in rows})
                raise SettingInvalid(
                    f"TENSORWAY_PLUGINS allows {item!r}.",
                    f"No installed plugin is called that. Installed: {', '.join(names) or 'none'}.",
                    f"{_did_you_mean(item, names)}Install it, or take it off the list.",
                )
        for slot in self._slots.values():
            why = self.left_out(slot.declaration)
            if why and slot.record is None:
                slot.block("denied", why, "Change TENSORWAY_PLUGINS to use it.")

    def _complain_about_conflicts(self) -> None:
        rivals: dict[tuple[str, str], list[Declaration]] = {}
        for slot in self._slots.values():
            if slot.record is None:
                rivals.setdefault((slot.declaration.kind, slot.declaration.name), []).append(slot.declaration)
        for (kind, name), rows in rivals.items():
            if len(rows) < 2:
                continue
            dists = ", ".join(row.dist for row in rows)
            reason = f"{kind} {name!r} is offered by {len(rows)} dists: {dists}"
            remedy = f"Ask for {rows[0].label} (or another), or deny one: TENSORWAY_PLUGINS=-{rows[1].label}"
            self.complaints += (Complaint("conflict", rows[0].dist, reason, remedy),)
            _logging.warn_once(
                _log,
                ("conflict", kind, name),
                "%s; none of them is used by that name alone",
                reason,
                rank=self.settings.local_rank,
                extra={"kind": kind, "backend": name, "code": "conflict"},
            )
            if self.settings.strict:
                raise PluginDefect(f"{kind} {name!r} was examined in strict mode.", f"{reason}.", f"{remedy}.")

    def _on_record(self, record: Record) -> None:
        if record.code == "denied":
            return  # somebody wanted this; it is in the report, and not worth a warning
        _logging.warn_once(
            _log,
            (record.kind, record.name, record.dist, record.code),
            "%s %s (%s %s) is not available: %s",
            record.kind,
            record.name,
            record.dist,
            record.version,
            record.reason,
            rank=self.settings.local_rank,
            extra={"kind": record.kind, "backend": record.name, "dist": record.dist, "code": record.code},
        )
        if self.settings.strict and record.defect:
            raise PluginDefect(
                f"{record.kind} {record.name!r} was examined in strict mode.",
                f"{record.dist} {record.version} is broken: {record.reason}.",
                f"{record.remedy} Without TENSORWAY_STRICT=1 it is left out.",
            )

    def _say_fallback(self, decision: Decision) -> None:
        assert decision.winner is not None and decision.winner.offer is not None
        better = [
            loser.candidate.name
            for loser in decision.losers
            if loser.candidate.stopped
            and loser.candidate.offer
            and loser.candidate.offer.priority > decision.winner.offer.priority
        ]
        if better:
            _logging.warn_once(
                _log,
                ("fallback", decision.request, decision.winner.label),
                "%s auto: using %s, because %s cannot be used here; tensorway why %s auto says why",
                decision.request.kind,
                decision.winner.name,
                " and ".join(better),
                decision.request.kind,
                rank=self.settings.local_rank,
                extra={"kind": decision.request.kind, "backend": decision.winner.name, "code": "fallback"},
            )

    def _nothing_usable(self, decision: Decision, asked: str) -> BackendUnavailable:
        losers = decision.losers
        if not losers:
            extra = 'pip install "tensorway[NAME]", and list what is there with tensorway plugins list.'
            return BackendUnavailable(asked, f"No installed plugin offers a {decision.request.kind}.", extra)
        reasons = "; ".join(f"{loser.candidate.name}: {loser.reason}" for loser in losers[:5])
        more = f"; and {len(losers) - 5} more" if len(losers) > 5 else ""
        return BackendUnavailable(
            asked,
            f"None of {len(losers)} can be used: {reasons}{more}.",
            f"Details: tensorway why {decision.request.kind} auto",
        )

    def _not_found(self, asked: str, name: str, kind: str | None) -> BackendNotFound:
        names = sorted({slot.declaration.name for slot in self.slots(kind)})
        true = f"No installed plugin offers it. Offered: {', '.join(names) or 'none'}."
        for dist in (f"{CORE}-{name}", name):
            if version := scan.installed_version(dist):
                true += f" ({dist} {version} is installed, but its metadata does not offer it.)"
                return BackendNotFound(asked, true, f"Reinstall it: pip install --force-reinstall {dist}")
        what = f'it: pip install "{CORE}[{name}]"' if name in scan.extras(CORE) else "the dist that offers it"
        near = _did_you_mean(name, names)
        start = f"{near}Or install" if near else "Install"
        then = "a process that is running then calls tensorway.plugins.refresh()"
        return BackendNotFound(asked, true, f"{start} {what}; {then}.")


def _whence(row: Declaration) -> str:
    if row.dist == IN_PROCESS:
        return "It was registered in this process"
    return f"{row.dist} {row.version} is installed"


def _candidate(slot: Slot) -> Candidate:
    record = slot.record
    # A construction that failed may work the next time (a port in use, an option); everything else is remembered.
    stopped = record if record is not None and record.state is not SlotState.CONSTRUCTED else None
    return Candidate(
        name=slot.declaration.name,
        dist=slot.declaration.dist,
        offer=slot.offer,
        probe=slot.probe_result,
        stopped=stopped.reason if stopped else "",
        remedy=stopped.remedy if stopped else "",
    )


def _selects(item: str, row: Declaration) -> bool:
    """Whether an item of TENSORWAY_PLUGINS means this backend: `name`, `kind:name`, `name@dist`, `kind:name@dist`."""
    kind, colon, rest = item.rpartition(":")
    name, at, dist = rest.partition("@")
    return name == row.name and (not colon or kind == row.kind) and (not at or canonical(dist) == row.dist)


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"Did you mean {near[0]!r}? " if near else ""


def _known_kind(kind: str) -> None:
    if kind not in HOOKS:
        raise BackendNotFound(
            f"A backend of kind {kind!r} was requested.",
            f"There is no such kind. Kinds: {', '.join(HOOKS)}.",
            _did_you_mean(kind, HOOKS) or "Use one of these.",
        )


__all__ = ["CORE", "IN_PROCESS", "Host"]
