"""How an engine may be divided for its pages to be moved. May import the core's errors."""

from __future__ import annotations

from tensorway.errors import Unsupported


def check_undivided(asked: str, to_do: str, *, pipeline: int, prefill_context: int, decode_context: int) -> None:
    """Raise `Unsupported` for a division by which a rank has not all layers, or not all tokens, of a page."""
    sizes = {"pipeline": pipeline, "prefill context": prefill_context, "decode context": decode_context}
    for what, size in sizes.items():
        if size != 1:
            raise Unsupported(asked, f"The {what} parallel size is {size}.", to_do)
