"""What words of a command may be, where several commands ask for the same. Room `cli`; imports nothing of ours."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def seconds(most: float, least: float | None = None) -> Callable[[str], float]:
    """A type for argparse: so many seconds at most, and above 0, or `least` of them."""
    said = f"a number of seconds above 0 and up to {most:g}" if least is None else f"from {least:g} to {most:g}"

    def _seconds(text: str) -> float:  # argparse says its name
        found = float(text)
        if not (0 < found if least is None else least <= found) or not found <= most:
            raise argparse.ArgumentTypeError(said)
        return found

    return _seconds
