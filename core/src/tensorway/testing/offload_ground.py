"""What the suites of offloading share: keys, blocks whose bytes follow from their keys, a clock, refusals, threads.

Room `testing`; may import `offload` and the rooms below.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterable, Sequence

from tensorway.errors import TensorwayError
from tensorway.metrics import Sample
from tensorway.offload import METRICS, OffloadKey, ReqContext, key_group, make_offload_key


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        """It is so much later."""
        self.now += seconds


def chain(name: str, count: int, start: int = 0, group: int = 0, salt: str = "") -> list[OffloadKey]:
    """The keys of a sequence that `name` stands for: the block at `start`, and those behind it."""
    return [
        make_offload_key(hashlib.sha256(f"{name} {position}".encode()).digest(), group, salt)
        for position in range(start, start + count)
    ]


def block(key: OffloadKey, nbytes: int) -> bytes:
    """What a block of this key holds: equal keys are equal bytes, and no two keys have the same."""
    return random.Random(bytes(key)).randbytes(nbytes)


def block_of(key: OffloadKey, nbytes: Sequence[int]) -> bytes:
    """The same where each cache group has blocks of a length of its own."""
    return block(key, nbytes[key_group(key)])


def request(name: str, salt: str = "") -> ReqContext:
    """A request that says nothing but its name."""
    return ReqContext(name, salt)


def refusal(call: Callable[[], object]) -> str:
    """The kind of error that a call was refused with; empty if it was not. What is no error of ours goes on."""
    try:
        call()
    except TensorwayError as error:
        return type(error).__name__
    return ""


def unknown_values(samples: Iterable[Sample]) -> list[str]:
    """Which of these are no values of the vocabulary: another name, or without a label that it has."""
    wrong = []
    for sample in samples:
        metric = METRICS.get(sample.metric)
        if metric is None or not set(metric.labels) <= {name for name, _ in sample.labels}:
            wrong.append(f"{sample.metric} {dict(sample.labels)}")
    return wrong


def together(threads: int, work: Callable[[int], None], seconds: float = 100.0) -> None:
    """Let so many threads do this at once; what the first of them raised is raised here."""
    raised: list[BaseException] = []
    begin = threading.Barrier(threads)

    def one(number: int) -> None:
        try:
            begin.wait(seconds)
            work(number)
        except BaseException as error:  # it is raised in the test
            raised.append(error)

    running = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(seconds)
    if raised:
        raise raised[0]
    assert not any(thread.is_alive() for thread in running), f"a call has not ended within {seconds:g} s"
