"""One slot per declared backend: how far it has come, and what stopped it.

Room `plugins`; may import the ground, `scan` and `probing`. A slot goes declared -> loadable -> usable ->
constructed. Each step is tried once; the step that fails leaves a `Record`, and the slot stays where it is until the
host is refreshed.
"""

from __future__ import annotations

import enum
import inspect
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

import attrs
import pluggy

from tensorway import hookspecs
from tensorway.deprecations import TensorwayDeprecationWarning
from tensorway.errors import HostBusy, OfferInvalid, PluginDefect
from tensorway.hookspecs import API, HOOKS, OLDEST_API
from tensorway.plugins import probing
from tensorway.plugins.scan import Declaration, printable
from tensorway.references import resolve
from tensorway.types import HookContext, Offer, ProbeResult


class SlotState(enum.Enum):
    """How far a slot has come."""

    #: Metadata says so.
    DECLARED = "declared"
    #: The plugin's module imports, and its offer satisfies the contract.
    LOADABLE = "loadable"
    #: The probe passed on this machine.
    USABLE = "usable"
    #: Somebody has one.
    CONSTRUCTED = "constructed"


#: Codes of records that mean "the plugin is broken", not "it cannot be used here". Strict mode raises on these.
DEFECTS: Final = frozenset(
    {
        "api-mismatch",
        "import-failed",
        "metadata-stale",
        "offer-invalid",
        "probe-aborted",
        "probe-raised",
        "probe-timeout",
    }
)


_SPOKEN: Final = f"{API}" if OLDEST_API == API else f"{OLDEST_API} to {API}"


@attrs.frozen
class Record:
    """What stopped a slot, kept for as long as the host lives."""

    kind: str
    name: str
    dist: str
    version: str
    #: The state that was not reached.
    state: SlotState
    #: Stable, for programs; the error catalogue has a section for each.
    code: str
    reason: str
    remedy: str
    milliseconds: float = 0.0
    #: A traceback, or the last lines that a child process printed. For `--debug`, never for the log.
    detail: str = attrs.field(default="", repr=False)

    @property
    def defect(self) -> bool:
        """Whether the plugin is broken, not merely unusable here."""
        return self.code in DEFECTS


@attrs.define(eq=False)
class Slot:
    """One backend that some dist declares. Threads may share it."""

    declaration: Declaration
    #: Called with each new record; in strict mode it raises.
    on_record: Callable[[Record], None] = attrs.field(repr=False)
    #: Held while plugin code is imported: one for the whole host, so that two plugins that need each other cannot
    #: deadlock.
    load_lock: threading.RLock = attrs.field(repr=False)
    state: SlotState = SlotState.DECLARED
    record: Record | None = None
    offer: Offer | None = None
    probe_result: ProbeResult | None = None
    #: Milliseconds that loading and probing took.
    load_ms: float = 0.0
    probe_ms: float = 0.0
    _loading: bool = attrs.field(default=False, init=False, repr=False)
    _probe_lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    @property
    def label(self) -> str:
        """`name@dist`."""
        return self.declaration.label

    def block(self, code: str, reason: str, remedy: str) -> None:
        """Keep this slot from being loaded."""
        self._fail(SlotState.LOADABLE, code, reason, remedy)

    def check_api(self) -> None:
        """Refuse a plugin of another API from its metadata.

        Code of the wrong generation may crash natively when it is imported.
        """
        api = self.declaration.api
        if api is None:
            self.block(
                "api-mismatch",
                f"its metadata does not say which plugin API it was written for; this core speaks {_SPOKEN}",
                f'Its author adds [project.entry-points."{hookspecs.API_GROUP}"] with the entry {API} = "its_package".',
            )
        elif not OLDEST_API <= api <= API:
            newer = api > API
            self.block(
                "api-mismatch",
                f"it was written for plugin API {api}, and this core speaks {_SPOKEN}",
                "Upgrade tensorway." if newer else f"Upgrade {self.declaration.dist}.",
            )

    def load(self, context: HookContext, seconds: float) -> Offer | None:
        """Import the plugin and take its offer; None when something stopped it, now or earlier."""
        if not self._untried():
            return self.offer
        if not self.load_lock.acquire(timeout=seconds):
            raise HostBusy(
                f"{self.declaration.kind} {self.label} was asked for.",
                f"Another thread has been importing a plugin for more than {seconds:g} s.",
                "Look at what that plugin does at import (tensorway doctor --debug), or raise TENSORWAY_PROBE_TIMEOUT.",
            )
        try:
            # Again, because another thread may have done it while this one waited.
            return self._load(context) if self._untried() else self.offer
        finally:
            self.load_lock.release()

    def probe(self, seconds: float) -> ProbeResult | None:
        """Ask the offer's probe, once; None when the probe itself failed (see `record`)."""
        offer = self.offer
        if offer is None:
            return None
        # Every probe has a deadline, so the thread that holds this lock gives it back.
        with self._probe_lock:
            if self.probe_result is None and self.record is None:
                started = time.perf_counter()
                answer = probing.run(offer, seconds)
                self.probe_ms = _milliseconds(started)
                self._judge_probe(answer)
        return self.probe_result

    def construct(self, options: object, context: object) -> object:
        """Call the factory. What it raises is the caller's; the record stays until a construction works."""
        assert self.offer is not None, "selection passes over what has no offer"
        assert self.offer.factory is not None, "selection passes over offers without a factory"
        started = time.perf_counter()
        try:
            backend = self.offer.factory(options, context)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._fail(
                SlotState.CONSTRUCTED,
                "construct-failed",
                describe(error),
                "Mend what it names and construct again; nothing is remembered against it.",
                _milliseconds(started),
                _trace(error),
            )
            raise
        self.state, self.record = SlotState.CONSTRUCTED, None
        return backend

    def _judge_probe(self, answer: probing.Answer) -> None:
        result = answer.result
        if isinstance(result, ProbeResult):
            self.probe_result = attrs.evolve(result, reason=printable(result.reason), remedy=printable(result.remedy))
            if result.usable:
                self.state = SlotState.USABLE
                return
        code = result.code if isinstance(result, probing.ProbeFailure) else "unusable"
        self._fail(SlotState.USABLE, code, result.reason, result.remedy, self.probe_ms, answer.output)

    def _untried(self) -> bool:
        return self.offer is None and self.record is None

    def _load(self, context: HookContext) -> Offer | None:
        if self._loading:
            self._fail(
                SlotState.LOADABLE,
                "import-failed",
                "its module asks for this very backend while it is being imported",
                "Report this to the plugin's author.",
            )
            return None
        self._loading = True
        started = time.perf_counter()
        try:
            offer = _take_offer(self.declaration, context)
        except (KeyboardInterrupt, PluginDefect):
            raise
        except OfferInvalid as error:
            self._fail(
                SlotState.LOADABLE, "offer-invalid", error.true, error.to_do, _milliseconds(started), _trace(error)
            )
        except BaseException as error:  # SystemExit from a plugin must not end the host
            code, remedy = import_problem(self.declaration, error)
            self._fail(SlotState.LOADABLE, code, describe(error), remedy, _milliseconds(started), _trace(error))
        else:
            if self.record is None:  # a plugin that asked for itself has been refused meanwhile
                self.offer, self.state, self.load_ms = offer, SlotState.LOADABLE, _milliseconds(started)
        finally:
            self._loading = False
        return self.offer

    def _fail(
        self, state: SlotState, code: str, reason: str, remedy: str, milliseconds: float = 0.0, detail: str = ""
    ) -> None:
        if self.record is not None and state is not SlotState.CONSTRUCTED:
            return  # the first reason is the cause; what comes after it is a consequence
        row = self.declaration
        self.record = Record(
            row.kind,
            row.name,
            row.dist,
            row.version,
            state,
            code,
            printable(reason),
            printable(remedy),
            milliseconds,
            detail,
        )
        self.on_record(self.record)


def check_offer(offer: object, kind: str, name: str) -> Offer:
    """Raise `OfferInvalid` unless this is an `Offer` for this kind and name."""
    asked = f"{kind} {name!r} was loaded."
    if not isinstance(offer, Offer):
        raise OfferInvalid(asked, f"its hook returned {type(offer).__name__}, not an Offer", _TELL_AUTHOR)
    if (offer.kind, offer.name) != (kind, name):
        raise OfferInvalid(
            asked, f"its hook returned an offer for {offer.kind} {offer.name!r}, not for {kind} {name!r}", _TELL_AUTHOR
        )
    return offer


def check_hook(hook: object, kind: str) -> Callable[..., object]:
    """Raise `OfferInvalid` unless pluggy accepts this function for the hook.

    A trial registration in a manager of its own.
    """
    asked = f"A {kind} hook was loaded."
    if not callable(hook):
        raise OfferInvalid(
            asked, f"its entry point refers to a value of type {type(hook).__name__}, not to a function", _TELL_AUTHOR
        )
    if inspect.iscoroutinefunction(hook):
        raise OfferInvalid(asked, "its hook is async; hooks are plain functions", _TELL_AUTHOR)
    trial = pluggy.PluginManager(hookspecs.PROJECT)
    trial.add_hookspecs(hookspecs)
    holder = type("Plugin", (), {kind: staticmethod(_marked(hook))})
    try:
        trial.register(holder, name=kind)
    except pluggy.PluginValidationError as error:
        wanted, got = inspect.signature(HOOKS[kind]), inspect.signature(hook)
        true = f"its hook is {kind}{got}, and the contract is {kind}{wanted}: {str(error).splitlines()[-1]}"
        raise OfferInvalid(asked, true, _TELL_AUTHOR) from error
    for deprecation in _deprecations(getattr(trial.hook, kind), hook):  # of which pluggy has warned
        if deprecation.due:
            raise OfferInvalid(asked, str(deprecation), "Upgrade the plugin; its author finds there what to change.")
    return hook


def _deprecations(caller: Any, hook: Callable[..., object]) -> list[TensorwayDeprecationWarning]:
    """What is deprecated of this hook as it is implemented."""
    of_arguments = caller.spec.warn_on_impl_args or {}
    found = [caller.spec.warn_on_impl, *(of_arguments.get(name) for name in inspect.signature(hook).parameters)]
    return [each for each in found if isinstance(each, TensorwayDeprecationWarning)]


_TELL_AUTHOR: Final = "Report this to the plugin's author; the contract is tensorway.hookspecs."


def _take_offer(declaration: Declaration, context: HookContext) -> Offer:
    hook = check_hook(resolve(declaration.value), declaration.kind)
    # The contract has one argument, and a hook may leave it out, as pluggy's may.
    arguments: dict[str, Any] = {"ctx": context} if "ctx" in inspect.signature(hook).parameters else {}
    return check_offer(hook(**arguments), declaration.kind, declaration.name)


def _marked(hook: Callable[..., object]) -> Callable[..., object]:
    # pluggy's marker writes an attribute on what it marks; a plugin's own function is left as it is.
    def implementation(*args: object, **kwargs: object) -> object:
        return hook(*args, **kwargs)

    implementation.__signature__ = inspect.signature(hook)  # type: ignore[attr-defined]
    implementation.__wrapped__ = hook  # type: ignore[attr-defined]
    if (code := getattr(hook, "__code__", None)) is not None:  # so that a warning names the plugin's own line
        place = {"co_filename": code.co_filename, "co_firstlineno": code.co_firstlineno}
        implementation.__code__ = implementation.__code__.replace(**place)
    return hookspecs.hookimpl(implementation)


def import_problem(declaration: Declaration, error: BaseException) -> tuple[str, str]:
    """Code and remedy for what importing a plugin raised."""
    package = declaration.value.partition(":")[0].partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        if error.name.partition(".")[0] == package:
            return "metadata-stale", f"Its metadata is stale: pip install --force-reinstall {declaration.dist}"
        return "import-failed", f"Install {error.name}, or reinstall {declaration.dist} with its dependencies."
    if isinstance(error, AttributeError) and "has no attribute" in str(error) and package in str(error):
        return "metadata-stale", f"Its metadata is stale: pip install --force-reinstall {declaration.dist}"
    return "import-failed", "Report this to the plugin's author; the traceback is in tensorway doctor --debug."


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _milliseconds(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 1)
