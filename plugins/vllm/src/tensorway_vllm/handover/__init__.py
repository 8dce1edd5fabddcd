"""`TensorwayConnector`: hands requests over between vLLM engines, by any connector of Tensorway.

May import vllm, the core and this package, and no device library. `connector` is what vLLM makes on both sides:
`scheduling` answers vLLM's scheduler, `working` is beside a rank's memory, and `words` is what goes between them.
Whatever a backend raises stays with the requests that it concerns; it does not end the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorway_vllm.handover.options import HandoverOptions
from tensorway_vllm.handover.wishes import HAND_OVER, TICKET

if TYPE_CHECKING:
    from tensorway_vllm.handover.connector import TensorwayConnector

__all__ = ["HAND_OVER", "TICKET", "HandoverOptions", "TensorwayConnector"]


def __getattr__(name: str) -> Any:
    """The connector needs vLLM; options are checked where there is none, too."""
    if name == "TensorwayConnector":
        from tensorway_vllm.handover.connector import TensorwayConnector

        return TensorwayConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
