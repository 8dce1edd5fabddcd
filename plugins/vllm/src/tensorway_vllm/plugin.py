"""What vLLM calls in each of its processes: tells it names, and where the classes are.

May import the standard library; vLLM itself only when it calls, and of this package nothing: an engine that uses none
of the names must not notice that they are there.
"""

from __future__ import annotations

import logging
from typing import Any, Final

SPEC: Final = ("TensorwayOffloadingSpec", "tensorway_vllm.spec")
CONNECTOR: Final = ("TensorwayOffloadingConnector", "tensorway_vllm.connector")
HANDOVER: Final = ("TensorwayConnector", "tensorway_vllm.handover")
#: As the entry point is called, and so as `VLLM_PLUGINS` must name it.
PLUGIN: Final = "tensorway"

_log = logging.getLogger(__name__)


def register() -> None:
    """Register names with vLLM's factories; again changes nothing. An engine starts, whatever goes wrong here."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.v1.kv_offload.factory import OffloadingSpecFactory

        for connector in (CONNECTOR, HANDOVER):
            _add(KVConnectorFactory, "register_connector", *connector)
        _add(OffloadingSpecFactory, "register_spec", *SPEC)
    except Exception as error:  # of any vLLM, which may have moved what is used here
        _log.warning(
            "Tensorway is not registered with vLLM, whose factories are not as expected (%s: %s). "
            "See: tensorway vllm doctor.",
            type(error).__name__,
            error,
        )


def _add(factory: Any, method: str, name: str, module: str) -> None:
    if name not in factory._registry:
        getattr(factory, method)(name, module, name)
