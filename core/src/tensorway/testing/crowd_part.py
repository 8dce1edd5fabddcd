"""One process of a crowd: many members of one group, each with a client, a lease and a watch of its own.

Room `testing`. Everything is what an engine would have, except the endpoint: it describes itself with as many bytes as
one of NIXL does, and is connected to by nobody, because what is measured is the rendezvous.
"""

from __future__ import annotations

import gc
import logging
import random
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any, Final

import attrs

import tensorway
from tensorway.errors import TensorwayError
from tensorway.process import raise_limit_of_files, resident_bytes
from tensorway.rendezvous import Directory, Fact

#: What an endpoint of NIXL 1.5 over UCX/TCP describes itself with: bare, and with the caches of 32 layers registered.
DESCRIPTION: Final = (646, 2662)
#: Members of one process that join at the same time.
_AT_ONCE: Final = 2
#: Seconds after which one that could not join tries again.
_AGAIN: Final = (0.5, 1.5)
#: Between two looks at how many others each member sees, in seconds, and how many times as long as a look takes: or the
#: looks of a thousand members were most of what they do.
_LOOK: Final = 0.1
_LOOKS: Final = 50
_FACTS: Final = {
    "engine": Fact("vllm 0.32.0", "inform"),
    "model": Fact("0123456789abcdef0123456789abcdef"),
    "block_bytes": Fact(2 << 20),
    "block_tokens": Fact(16),
    "layers": Fact(32),
    "dtype": Fact("bfloat16"),
    "tensor_parallel": Fact(8, "divide"),
    "library": Fact("nixl 1.5.1", "inform"),
}


@attrs.frozen
class Joined:
    """What it took a process to let its members join."""

    #: How often one had to try again, because the store did not answer in time.
    retries: int
    #: Bytes of memory, of each member.
    memory_each: int


@attrs.frozen
class Seen:
    """When each member saw as many others as it should, by the clock that all processes of a host share."""

    at: list[float]
    #: How many others were seen by those that did not, in the end.
    wrong: list[int]


class Part:
    """The members of one process."""

    def __init__(self, backend: str, options: dict[str, Any], group: str, ttl: float) -> None:
        self._backend, self._options, self._group, self._ttl = backend, options, group, ttl
        self._members: list[Directory] = []
        #: Each one's client, and the member itself.
        self._held: list[ExitStack] = []
        self._retries = 0
        with tensorway.create("rendezvous", backend, options):
            pass  # what it imports is imported now, and not when the first joins

    def join(self, first: int, count: int, deadline: float) -> Joined:
        """Let so many members join."""
        before, until = resident_bytes(), time.monotonic() + deadline
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda number: self._join(f"member-{number:05}", until), range(first, first + count)))
        return Joined(self._retries, (resident_bytes() - before) // count)

    def sees(self, others: int, deadline: float) -> Seen:
        """Wait until each member sees so many others."""
        until, at = time.monotonic() + deadline, dict[int, float]()
        while True:
            began = time.monotonic()
            for number, member in enumerate(self._members):
                if number not in at and len(member.members()) == others:
                    at[number] = time.monotonic()
            ended = time.monotonic()
            if len(at) == len(self._members) or ended > until:
                break
            time.sleep(max(_LOOK, min(_LOOKS * (ended - began), 2.0)))
        missing = (member for number, member in enumerate(self._members) if number not in at)
        return Seen(list(at.values()), [len(member.members()) for member in missing])

    def _join(self, name: str, until: float) -> None:
        endpoint: Any = _Endpoint()
        while True:
            with ExitStack() as stack:
                try:
                    rendezvous = stack.enter_context(tensorway.create("rendezvous", self._backend, self._options))
                    member = stack.enter_context(Directory(rendezvous, endpoint, name, self._group, _FACTS, self._ttl))
                    endpoint.description = bytes(DESCRIPTION[1])
                    member.live()
                except TensorwayError:
                    self._retries += 1
                    if time.monotonic() > until:
                        raise
                    time.sleep(random.uniform(*_AGAIN))
                else:
                    self._members.append(member)
                    self._held.append(stack.pop_all())
                    return


class _Endpoint:
    """Something that describes itself."""

    name = "nixl"

    def __init__(self) -> None:
        self.incarnation = uuid.uuid4().hex
        self.description = bytes(DESCRIPTION[0])

    def describe(self) -> bytes:
        return self.description


def work(orders: Connection, *given: Any) -> None:
    """The life of a process: do what is ordered, until nobody orders any more."""
    logging.getLogger("tensorway").addHandler(logging.NullHandler())  # that a store is away is what is measured
    raise_limit_of_files()
    gc.disable()  # else it walks what all members here know, again and again, where each process of a group has one
    part = Part(*given)
    while True:
        try:
            name, arguments = orders.recv()
        except EOFError:
            return
        try:
            orders.send(part.join(*arguments) if name == "join" else part.sees(*arguments))
        except TensorwayError as error:
            orders.send(str(error))
