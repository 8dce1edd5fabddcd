"""Offers a transport to Ray as one for tensors: `register`, and the check that Ray's interface is the one we know.

May import tensorway's ground and its own package; imports Ray when it is called. The interface is alpha: Ray changes it
without notice, and what fits it by accident would fail inside an actor, in the middle of a transfer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from tensorway.errors import BackendConflict, BackendUnavailable, SettingInvalid
from tensorway_ray.probe import INSTALL

#: Ray's interface as it is in 2.60: what it calls, with what.
REGISTER: Final = ("transport_name", "devices", "transport_manager_class", "data_type")
METHODS: Final[Mapping[str, tuple[str, ...]]] = {
    "tensor_transport_backend": ("self",),
    "is_one_sided": (),
    "can_abort_transport": (),
    "actor_has_tensor_transport": ("self", "actor"),
    "extract_tensor_transport_metadata": ("self", "obj_id", "rdt_object"),
    "get_communicator_metadata": ("self", "src_actor", "dst_actor", "backend"),
    "recv_multiple_tensors": (
        "self",
        "obj_id",
        "tensor_transport_metadata",
        "communicator_metadata",
        "target_buffers",
    ),
    "fetch_multiple_tensors": (
        "self",
        "obj_id",
        "tensor_transport_metadata",
        "communicator_metadata",
        "target_buffers",
    ),
    "wait_fetch_complete": ("self", "fetch_request", "timeout"),
    "send_multiple_tensors": ("self", "tensors", "tensor_transport_metadata", "communicator_metadata"),
    "garbage_collect": ("self", "obj_id", "tensor_transport_meta", "tensors"),
    "abort_transport": ("self", "obj_id", "communicator_metadata"),
}


def register(
    name: str = "tensorway",
    transport: str = "auto",
    options: Mapping[str, Any] | None = None,
    devices: Sequence[str] = ("cpu",),
    seconds: float = 30.0,
) -> str:
    """Offer a transport of tensorway to Ray; returns the name that Ray knows it by, which is in capitals.

    Call it before the actors that use it are made, in the process that makes them. `options` are the transport's;
    `devices` are kinds of memory whose tensors it may be given; a transfer ends within `seconds`, one way or the other.
    """
    asked = f"The transport {transport} was to be offered to Ray as {name!r}."
    if not 0 < seconds <= 3600:
        raise SettingInvalid(asked, f"Its transfers were to end within {seconds!r} s.", "Give 1 to 3600 seconds.")
    ray = _loaded(asked)
    manager = getattr(getattr(ray.experimental, "rdt", None), "TensorTransportManager", None)
    check(asked, str(ray.__version__), getattr(ray.experimental, "register_tensor_transport", None), manager)
    import torch

    from tensorway_ray.tensors import Tensors

    label = name.upper()
    facts = {"label": label, "transport": transport, "options": dict(options or {}), "seconds": float(seconds)}
    # Made here and not written down in a module: so Ray sends the class itself to the actors, with what it is to be.
    made = type("RegisteredTensors", (Tensors,), facts)
    try:
        ray.experimental.register_tensor_transport(label, list(devices), made, torch.Tensor)
    except ValueError as error:
        raise BackendConflict(
            asked, f"Ray refused: {error}", "Choose another name; one name is one transport."
        ) from error
    return label


def check(asked: str, version: str, function: Callable[..., Any] | None, manager: type | None) -> None:
    """Raise `BackendUnavailable` unless Ray's interface is the one that we know."""
    to_do = "Install a Ray that has it, 2.60 for example; or pass tensors through Ray's object store."
    if function is None or manager is None:
        raise BackendUnavailable(asked, f"Ray {version} has no tensor transports of others.", to_do)
    wrong = [] if _parameters(function) == REGISTER else ["register_tensor_transport"]
    wrong += [each for each, parameters in METHODS.items() if _parameters(getattr(manager, each, None)) != parameters]
    wrong += sorted(set(getattr(manager, "__abstractmethods__", ())) - set(METHODS))
    if wrong:
        true = f"Ray {version} asks something else of a tensor transport than Ray 2.60 did: {', '.join(wrong)}."
        raise BackendUnavailable(asked, true, to_do)


def _parameters(function: Callable[..., Any] | None) -> tuple[str, ...] | None:
    return None if function is None else tuple(inspect.signature(function).parameters)


def _loaded(asked: str) -> Any:
    try:
        import ray
        import ray.experimental
        import torch  # noqa: F401 - Ray's tensors are torch's
    except ImportError as error:
        to_do = f"{INSTALL}, and torch" if error.name != "torch" else "Install torch: Ray's tensors are torch's."
        raise BackendUnavailable(asked, f"{error.name} cannot be loaded: {error}.", to_do) from error
    return ray
