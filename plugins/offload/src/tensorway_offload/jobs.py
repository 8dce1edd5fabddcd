"""What is being copied, and the rows that nobody else may have meanwhile. May import the core's offload room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import attrs

from tensorway.offload import OffloadKey
from tensorway_offload.requests import Request


@attrs.define(eq=False)
class Job:
    """One load, store, promotion or cascade, which holds each of its rows once."""

    what: Literal["load", "store", "promoted", "cascaded"]
    keys: Sequence[OffloadKey]
    rows: Sequence[int]
    request: Request
    epoch: int
    until: float
    #: It took longer than it may: its blocks are given up, and its rows are held until it ends all the same.
    late: bool = False


class Jobs:
    """Jobs by number. All may take equally long, so that the oldest is overdue first."""

    def __init__(self) -> None:
        self._open: OrderedDict[int, Job] = OrderedDict()
        self._late: dict[int, Job] = {}

    def begin(self, number: int, job: Job) -> None:
        """This one is under way."""
        self._open[number] = job

    def get(self, number: int) -> Job | None:
        """The job of this number that has not ended."""
        return self._open.get(number) or self._late.get(number)

    def end(self, number: int) -> None:
        """It has ended."""
        if self._open.pop(number, None) is None:
            del self._late[number]

    def overdue(self, now: float) -> list[Job]:
        """Those whose time is over since the last call."""
        found: list[Job] = []
        while self._open:
            number, job = next(iter(self._open.items()))
            if job.until > now:
                break
            self._late[number] = self._open.pop(number)
            job.late = True
            found.append(job)
        return found
