"""What vLLM's expert balancing must look like for ours to be in it: one look for each thing that is used or replaced.

May import this package's probes, and vllm when it is asked. Releases differ here more than elsewhere, and vLLM promises
nothing: whoever asks for ours is refused where a look finds something else, and who does not ask never notices.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Final

from tensorway.errors import Incompatible
from tensorway_vllm import probes
from tensorway_vllm.probes import Finding

#: The module in which names are replaced, and these names, with what each is replaced for.
STATE: Final = "vllm.distributed.eplb.eplb_state"
REPLACED: Final[dict[str, str]] = {
    "create_eplb_communicator": "makes the communicator that is asked for",
    "EPLB_POLICIES": "has the policy that is asked for",
    "EplbState.__init__": "refuses what cannot be meant or does not fit, before weights are loaded",
}

_COMMUNICATOR: Final = "vllm.distributed.eplb.eplb_communicator"
_POLICY: Final = "vllm.distributed.eplb.policy"
_CREATE: Final = ("group_coordinator", "backend", "expert_weights", "expert_buffer")
_ABSTRACT: Final = frozenset({"add_send", "add_recv", "execute"})
#: All that vLLM may ask of a communicator. A name that is new is a question that ours has no answer to.
_PUBLIC: Final = _ABSTRACT | {"set_transfer_context", "set_stream", "needs_profile_buffer_reservation"}
_REBALANCE: Final = (
    "weight",
    "num_replicas",
    "num_groups",
    "num_nodes",
    "num_ranks",
    "old_global_expert_indices",
)  # fmt: skip
_GROUP: Final = ("cpu_group", "rank_in_group", "world_size")


def looks() -> list[Finding]:
    """What was looked at, in the order in which it matters. Imports vLLM's expert balancing."""
    return [_looked(what, look) for what, look in _LOOKS]


def check() -> None:
    """Raise `Incompatible` with all that does not fit."""
    if wrong := [f"{each.what}: {each.found}" for each in looks() if not each.good]:
        raise Incompatible(
            f"Tensorway was to take part in the expert balancing of vLLM {probes.version()}.",
            f"This vLLM is not as expected. {'; '.join(wrong)}.",
            "Take 'eplb' out of --additional-config, or use a vLLM that `tensorway vllm doctor` finds fit.",
        )


def _looked(what: str, look: Callable[[], str]) -> Finding:
    try:
        wrong = look()
    except Exception as error:  # of whatever is installed under that name
        return Finding(what, False, f"{type(error).__name__}: {error}")
    return Finding(what, not wrong, wrong or "as expected")


def _of(module: str, *path: str) -> Any:
    found: Any = importlib.import_module(module)
    for name in path:
        found = getattr(found, name)
    return found


def _takes(function: Any, *expected: str) -> str:
    # Through what has been put around it, ours included.
    found = tuple(inspect.signature(function).parameters)
    return f"it takes ({', '.join(found)}), not ({', '.join(expected)})" if found != expected else ""


def _has(found: Iterable[str], expected: Iterable[str]) -> str:
    found, expected = set(found), set(expected)
    lacking, new = sorted(expected - found), sorted(found - expected)
    said = [f"it has no {', '.join(lacking)}"] * bool(lacking) + [f"{', '.join(new)} is new"] * bool(new)
    return "; ".join(said)


def _asked_by_name(method: str, name: str) -> str:
    """Whether a method looks a name up when it is called: one that does not would never meet what replaces it."""
    function = inspect.unwrap(_of(STATE, "EplbState", method))
    return "" if name in function.__code__.co_names else f"it does not ask for {name}"


def _communicator() -> str:
    base = _of(_COMMUNICATOR, "EplbCommunicator")
    public = {name for name in vars(base) if not name.startswith("_")}
    return _has(base.__abstractmethods__, _ABSTRACT) or _has(public, _PUBLIC)


def _stream() -> str:
    found = len(inspect.signature(_of(_COMMUNICATOR, "EplbCommunicator", "set_stream")).parameters)
    return "" if found == 2 else f"it takes {found - 1} things"


def _policies() -> str:
    found = _of(STATE, "EPLB_POLICIES")
    return "" if isinstance(found, dict) and "default" in found else "it is no dict with a 'default'"


def _config() -> str:
    config = _of("vllm.config")
    if not callable(getattr(config, "get_current_vllm_config_or_none", None)):
        return "there is no get_current_vllm_config_or_none"
    return "" if "additional_config" in config.VllmConfig.__dataclass_fields__ else "it has no additional_config"


_LOOKS: Final[tuple[tuple[str, Callable[[], str]], ...]] = (
    ("create_eplb_communicator()", lambda: _takes(_of(STATE, "create_eplb_communicator"), *_CREATE)),
    ("EplbState()", lambda: _takes(_of(STATE, "EplbState", "__init__"), "self", "parallel_config", "device")),
    ("EplbState.add_model", lambda: _asked_by_name("add_model", "create_eplb_communicator")),
    ("EplbState.create_communicator", lambda: _asked_by_name("create_communicator", "create_eplb_communicator")),
    ("EplbCommunicator", _communicator),
    (
        "EplbCommunicator.add_send",
        lambda: _takes(_of(_COMMUNICATOR, "EplbCommunicator", "add_send"), "self", "tensors", "dst_rank", "expert_id"),
    ),
    (
        "EplbCommunicator.add_recv",
        lambda: _takes(_of(_COMMUNICATOR, "EplbCommunicator", "add_recv"), "self", "tensors", "src_rank", "expert_id"),
    ),
    ("EplbCommunicator.execute", lambda: _takes(_of(_COMMUNICATOR, "EplbCommunicator", "execute"), "self")),
    (
        "EplbCommunicator.set_transfer_context",
        lambda: _takes(
            _of(_COMMUNICATOR, "EplbCommunicator", "set_transfer_context"), "self", "old_indices", "layer_idx"
        ),
    ),
    ("EplbCommunicator.set_stream", _stream),
    (
        "GroupCoordinator",
        lambda: _has(
            set(_GROUP).intersection(_of("vllm.distributed.parallel_state", "GroupCoordinator").__annotations__), _GROUP
        ),
    ),
    ("EPLB_POLICIES", _policies),
    ("EplbState.add_model, for policies", lambda: _asked_by_name("add_model", "EPLB_POLICIES")),
    (
        "AbstractEplbPolicy.rebalance_experts",
        lambda: _takes(_of(_POLICY, "AbstractEplbPolicy", "rebalance_experts"), *_REBALANCE),
    ),
    ("VllmConfig", _config),
)
