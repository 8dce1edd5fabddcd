"""Tensorway moves the state of LLM inference (KV-cache blocks, expert weights) over whichever fabric the machine has.

This is the front door: `create` gives you a backend by name or the best one for `auto`, `decide` says why. Importing it
imports nothing else; each name below is loaded when it is first read (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name -> where it lives.
_HOMES = {
    "HookContext": "tensorway.types",
    "NoOptions": "tensorway.types",
    "Offer": "tensorway.types",
    "ProbeResult": "tensorway.types",
    "TensorwayError": "tensorway.errors",
}

__all__ = ["HookContext", "NoOptions", "Offer", "ProbeResult", "TensorwayError", "__version__", "create", "decide"]


def create(kind: str, name: str = "auto", options: Any = None, context: Any = None, **wants: Any) -> Any:
    """Construct a backend of one kind; see `tensorway.plugins.Host.create`."""
    from tensorway.plugins import host

    return host().create(kind, name, options, context, **wants)


def decide(kind: str, name: str = "auto", **wants: Any) -> Decision:
    """Which backend `create` would construct, and why not the others; see `tensorway.plugins.Host.decide`."""
    from tensorway.plugins import host

    return host().decide(kind, name, **wants)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if TYPE_CHECKING:
    from tensorway.errors import TensorwayError
    from tensorway.plugins.select import Decision
    from tensorway.types import HookContext, NoOptions, Offer, ProbeResult
