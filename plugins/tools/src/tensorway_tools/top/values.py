"""What a page of metrics says, read as if somebody hostile had written it: the text that Prometheus reads.

Of the package `top` everything may import this; it may import the core. A line that is none of ours is passed over, one
that looks like ours and cannot be read makes the whole page one that is not believed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from tensorway.errors import DescriptionInvalid
from tensorway.plugins.scan import printable

#: Name without `tensorway_`, its labels, its value.
Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]

#: Values of one page; beyond that a page is no page of ours.
MOST: Final = 50_000
_LONGEST: Final = 80
#: No count or size of ours comes near it, and sums of a whole page stay finite below it.
_LARGEST: Final = 1e18
# vLLM gives out only what begins as its own names do.
_LINE: Final = re.compile(r"(?:vllm:)?tensorway_([a-z_]{1,100})(?:\{(.*)\})? (\S{1,40})(?: \d+)?", re.ASCII)
_LABEL: Final = re.compile(r'([a-zA-Z_]\w{0,99})="((?:[^"\\]|\\.)*)"(?:,|$)', re.ASCII)
_ESCAPED: Final[Mapping[str, str]] = {"\\n": "\n", '\\"': '"', "\\\\": "\\"}


def read(text: str) -> Values:
    """All values of ours; raises `DescriptionInvalid` for what is none."""
    found: Values = {}
    for line in text.split("\n"):
        if not line.startswith(("tensorway_", "vllm:tensorway_")):
            continue
        match = _LINE.fullmatch(line)
        labels = _labels(match[2] or "") if match else None
        value = _number(match[3]) if match else None
        if match is None or labels is None or value is None or len(found) >= MOST:
            raise DescriptionInvalid(
                "Values of a process were to be read.",
                f"What it says is not theirs: {printable(line[:_LONGEST])}"
                if len(found) < MOST
                else "It says too much.",
                "See what listens there; tensorway itself serves the text format 0.0.4.",
            )
        if "le" not in dict(labels):  # a histogram's sum and count are enough
            found[match[1], labels] = found.get((match[1], labels), 0.0) + value
    return found


def _labels(text: str) -> tuple[tuple[str, str], ...] | None:
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        match = _LABEL.match(text, at)
        if match is None or len(found) > 16:
            return None
        value = re.sub(r"\\.", lambda part: _ESCAPED.get(part[0], part[0]), match[2])
        found.append((match[1], printable(value[:_LONGEST])))
        at = match.end()
    return tuple(sorted(found))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < _LARGEST else None  # which NaN is not, either
