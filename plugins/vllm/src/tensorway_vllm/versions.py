"""Which releases of vLLM this dist is for, and what differs between them.

Data and no vLLM; may import attrs. Nothing is chosen by a number: what differs is a feature, whose adapter looks for
the feature itself. The table says what each release is known to have, so that a build that has something else is
noticed.
"""

from __future__ import annotations

import re
from typing import Final, Literal

import attrs

#: `supported`: a release of the table. `newer`, `unknown`: looked at closely, and used if all looks are good. `older`:
#: refused, for what was not looked for then may be missing.
Judgement = Literal["supported", "newer", "older", "unknown"]


@attrs.frozen
class Feature:
    """Something that a release may have or not."""

    #: What it is, for people; and what is so without it.
    what: str
    without: str
    #: Where it is: a module, and names in it, one inside of the other.
    module: str
    names: tuple[str, ...] = ()
    #: The module of this package that looks for it.
    adapter: str = ""


_BASE: Final = "vllm.distributed.kv_transfer.kv_connector.v1.base"

FEATURES: Final[dict[str, Feature]] = {
    "hit_sources": Feature(
        "vLLM asks where cached tokens came from",
        "they are external in vLLM's metrics, and no more is said of them",
        "vllm.v1.metrics.cache_hit_source",
        ("CacheHitSource",),
        adapter="sources",
    ),
    "loaded_groups": Feature(
        "vLLM asks which cache groups a load fills",
        "vLLM takes it that all are filled, which is so",
        _BASE,
        ("KVConnectorBase_V1", "get_loaded_kv_cache_group_ids"),
        adapter="handover.connector",
    ),
}


@attrs.frozen
class Release:
    """One of the table."""

    #: With which version everything was run.
    tried: str
    features: frozenset[str]


#: By the first two numbers, the oldest first.
RELEASES: Final[dict[str, Release]] = {
    "0.30": Release("0.30.0", frozenset()),
    "0.31": Release("0.31.0", frozenset()),
    "0.32": Release("0.32.0", frozenset({"hit_sources", "loaded_groups"})),
}


def release(version: str) -> str:
    """The first two numbers of a version; empty if it begins otherwise, or is a build of no release (0.0, 0.1)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return f"{int(found[1])}.{int(found[2])}" if found and _numbers(found[0]) > (0, 1) else ""


def judged(version: str) -> Judgement:
    """What to think of a vLLM of this version."""
    found = release(version)
    if found in RELEASES:
        return "supported"
    if not found:
        return "unknown"
    return "older" if _numbers(found) < _numbers(next(iter(RELEASES))) else "newer"


def span() -> str:
    """The supported releases, for people."""
    first, *_, last = RELEASES
    return f"{first} to {last}"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split("."))
