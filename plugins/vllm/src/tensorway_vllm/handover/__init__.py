"""`TensorwayConnector`: hands requests over between vLLM engines, by any connector of Tensorway.

May import this package. `connector` is what vLLM makes on both sides: `scheduling` answers vLLM's scheduler, `working`
is beside a rank's memory, `words` is what goes between them, and these three import vllm; nothing here imports a device
library. Whatever a backend raises stays with the requests that it concerns; it does not end the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tensorway_vllm.handover.connector import TensorwayConnector
    from tensorway_vllm.handover.options import HandoverOptions
    from tensorway_vllm.handover.wishes import HAND_OVER, TICKET

#: Public name -> where it is: options and names are read where no vLLM is.
_HOMES: Final = {
    "HAND_OVER": "wishes",
    "TICKET": "wishes",
    "HandoverOptions": "options",
    "TensorwayConnector": "connector",
}

__all__ = ["HAND_OVER", "TICKET", "HandoverOptions", "TensorwayConnector"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
