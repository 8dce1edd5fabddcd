"""Can NCCL be used here? Runs in a child process. May import tensorway's ground and its own package."""

from __future__ import annotations

from typing import Final

from tensorway.platforms import report
from tensorway.types import Fact, ProbeResult
from tensorway_nccl.library import OLDEST, Nccl, NotFound, find

_INSTALL: Final = 'pip install "tensorway[nccl]"'


def probe() -> ProbeResult:
    """Look for a device, then for a library of NCCL's interface that is new enough; both are in the facts."""
    cuda, rocm = report("cuda"), report("rocm")
    found = find("rocm" if rocm.usable and not cuda.usable else "cuda")
    facts: dict[str, Fact] = {}
    if isinstance(found, Nccl):
        facts.update(nccl=found.dotted, library=found.path)
    if not (cuda.usable or rocm.usable):
        # Where one of the two left a trace, what is missing of it is the news; where neither did, both are.
        seen = rocm if rocm.evidence and not cuda.evidence else cuda
        neither = not (rocm.evidence or cuda.evidence)
        return ProbeResult.failed(f"{cuda.reason}; {rocm.reason}" if neither else seen.reason, seen.remedy, **facts)
    return judge(found, facts)


def judge(found: Nccl | NotFound, facts: dict[str, Fact]) -> ProbeResult:
    """What the library that was found, or not, is good for on a machine with a device."""
    if isinstance(found, NotFound):
        if found.broken:
            reason = f"NCCL is here but does not load ({found.broken})"
            return ProbeResult.failed(reason, "Reinstall the package that it belongs to.", **facts)
        return ProbeResult.failed("NCCL is not installed", _INSTALL, **facts)
    if found.version[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return ProbeResult.failed(f"NCCL {found.dotted} is older than {oldest}", f"Upgrade it: {_INSTALL}", **facts)
    if found.missing:
        return ProbeResult.failed(f"NCCL {found.dotted} lacks {', '.join(found.missing)}", _INSTALL, **facts)
    return ProbeResult.passed(f"NCCL {found.dotted} in {found.path}", **facts)
