"""What goes between the manager's and the workers' side of vLLM: where blocks are, and what became of jobs.

May import vllm. Both are pickled, so they are data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs
from vllm.v1.kv_offload.base import LoadStoreSpec

from tensorway.offload import LoadStoreSpec as OurSpec


class Carried(LoadStoreSpec):
    """A backend's own spec, and the number of the ticket that it is of; None for what is not there after all."""

    def __init__(self, number: int, spec: OurSpec | None) -> None:
        self.number, self.spec = number, spec

    def __repr__(self) -> str:
        return f"Carried({self.number}, {self.spec!r})"


@attrs.frozen
class Outcome:
    """What workers say of jobs, by the numbers of tickets."""

    #: How many workers have ended each.
    ended: Mapping[int, int] = attrs.field(factory=dict)
    #: Positions of blocks that failed on any of them.
    failed: Mapping[int, frozenset[int]] = attrs.field(factory=dict)

    def __bool__(self) -> bool:
        return bool(self.ended)

    @classmethod
    def of(cls, several: Iterable[Outcome]) -> Outcome:
        """All of them together."""
        ended: dict[int, int] = {}
        failed: dict[int, frozenset[int]] = {}
        for each in several:
            for number, count in each.ended.items():
                ended[number] = ended.get(number, 0) + count
            for number, places in each.failed.items():
                failed[number] = failed.get(number, frozenset()) | places
        return cls(ended, failed)
