"""The one way in which a native Python library gets into the process: late, once, and with the answer kept.

Ground: may import `errors`, `references`, `settings` and `_logging`. Plugins declare a `NativeLibrary` and read its
symbols as lazy module attributes (PEP 562); nothing is imported until the first of them is read.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs

from tensorway import _logging, settings
from tensorway.errors import BackendUnavailable
from tensorway.references import resolve

_log = _logging.logger("native")
#: Every library that was declared, so that `forget_failures` reaches them.
_declared: Final[weakref.WeakSet[NativeLibrary]] = weakref.WeakSet()
#: What else remembers how it found this machine.
_remembering: Final[list[Callable[[], None]]] = []


@attrs.frozen
class Loaded:
    """A library that is in the process."""

    #: The package that was found: `nixl_cu12`.
    module: str
    #: What the declaration asked for, by its own names.
    symbols: Mapping[str, Any]


@attrs.frozen
class Absent:
    """A library that cannot be had, and why."""

    reason: str
    remedy: str


@attrs.define(eq=False, weakref_slot=True)
class NativeLibrary:
    """A native library under one of several package names; threads may share it.

    Loading sets `environment` (only what the user left unset), imports the first package of `modules` that has all the
    `symbols`, and keeps the result, good or bad: CPython remembers imports that worked, not those that failed.
    """

    #: What people call it: "NIXL".
    name: str
    #: Package names, the preferred one first; a callable when the order depends on the machine.
    modules: Sequence[str] | Callable[[], Sequence[str]]
    #: Our name -> "submodule:attribute".
    symbols: Mapping[str, str]
    #: What to do when it is missing.
    remedy: str
    #: Variables that must be set before the library loads, with why, for the warning when it is too late.
    environment: Mapping[str, str] = attrs.field(factory=dict)
    #: Asked when no package will do; may know a better reason than "not installed".
    explain: Callable[[], Absent | None] | None = None
    _result: Loaded | Absent | None = attrs.field(default=None, init=False)
    _lock: threading.RLock = attrs.field(factory=threading.RLock, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        _declared.add(self)

    def result(self) -> Loaded | Absent:
        """Load the library unless that was tried before; never raises for a library that is missing or broken."""
        if self._result is None:
            with self._lock:
                if self._result is None:
                    self._result = self._load()
        return self._result

    def symbol(self, name: str) -> Any:
        """One of `symbols`; raises `BackendUnavailable` with the kept reason when the library cannot be had."""
        result = self.result()
        if isinstance(result, Absent):
            raise BackendUnavailable(
                f"{self.name} was asked for {name!r}.", f"{self.name} cannot be loaded: {result.reason}.", result.remedy
            )
        return result.symbols[name]

    def forget_failure(self) -> None:
        """Let the next use try again if the library was absent; one that is loaded stays."""
        with self._lock:
            if isinstance(self._result, Absent):
                self._result = None

    def _load(self) -> Loaded | Absent:
        modules = tuple(self.modules() if callable(self.modules) else self.modules)
        self._prepare_environment(modules)
        broken, missing = [], []
        for module in modules:
            try:
                if importlib.util.find_spec(module) is None:
                    missing.append(f"{module} is not installed")
                    continue
                with _logging.preserved():
                    return Loaded(module, {name: resolve(f"{module}.{path}") for name, path in self.symbols.items()})
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a library may raise anything here, SystemExit included
                broken.append(f"{module} is installed but does not load ({type(error).__name__}: {_one_line(error)})")
        better = self.explain() if self.explain else None
        # What is there and broken comes first: reports cut long lines.
        return better or Absent("; ".join(broken + missing), self.remedy)

    def _prepare_environment(self, modules: Sequence[str]) -> None:
        early = next((module for module in modules if module in sys.modules), None)
        ours = [f"{name}={value}" for name, value in self.environment.items() if settings.set_default(name, value)]
        if ours and early is not None:
            _logging.warn_once(
                _log,
                (self.name, "environment"),
                "%s was imported (as %s) before tensorway could set %s; set it before the process starts",
                self.name,
                early,
                ", ".join(ours),
                rank=settings.local_rank(),
                extra={"library": self.name, "variables": ours},
            )


def lazy_attributes(library: NativeLibrary, module: str) -> Callable[[str], Any]:
    """A module `__getattr__` (PEP 562) that serves the library's symbols and loads it when the first is read."""

    def __getattr__(name: str) -> Any:  # noqa: N807 - it becomes the module's own
        if name in library.symbols:
            return library.symbol(name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


def forget_failures() -> None:
    """Let every library that was absent be tried again; called after something was installed."""
    for library in list(_declared):
        library.forget_failure()
    for forget in _remembering:
        forget()


def with_failures(forget: Callable[[], None]) -> None:
    """Call this function of a module, too, whenever failures are forgotten: what the module saw may have changed."""
    _remembering.append(forget)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no message"
