"""Engines that hand over to each other, and what can be done to them: for tests of failures, and for `havoc`.

May import the core, torch for the model, and vllm in the processes that it starts.
"""

from __future__ import annotations

import random
import re
import secrets
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import tensorway
from tensorway.errors import DeadlineExceeded
from tensorway_vllm.testing.disaggregated import Served, transfer
from tensorway_vllm.testing.tiny import make

#: Of engines here: short, so that a test need not wait long for their end, and longer than a busy machine is late.
OPTIONS: Final[dict[str, Any]] = {"transport": "local", "deadline": 5.0, "lease": 8.0, "presence": 2.0}
#: Seconds after which everything that was kept or awaited is over, on a machine that does much else.
OVER: Final = 60.0
HAND_OVER: Final = {"hand_over": True}
#: Of an engine's environment.
VARIABLES: Final = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
#: Seconds that a door has to answer; most have nothing to say to strangers.
_HEARD: Final = 0.2
_SOCKET: Final = re.compile(r"socket:\[(\d+)\]")
#: A listening socket in the kernel's tables: of TCP by state, of Unix by flags.
_LISTENS, _ACCEPTS = "0A", 0x10000


def prompt_of(seed: int, tokens: int = 300) -> list[int]:
    """A prompt that no other seed has."""
    numbers = random.Random(seed)
    return [numbers.randrange(4, 2000) for _ in range(tokens)]


class Deployment:
    """A rendezvous in this process, and engines by their names, each in a process."""

    def __init__(self, folder: Path, **options: Any) -> None:
        """`options`: of the connector."""
        self.folder, self.secret = folder, secrets.token_hex(16)
        self.model = str(make(folder / "model"))
        self._variables = {**VARIABLES, "HOME": str(folder)}
        self._options = {**OPTIONS, **options, "secret": self.secret}
        self._meeting: Any = tensorway.create("rendezvous", "direct", {"secret": self.secret})
        self.address: str = self._meeting.address
        self._engines: dict[str, Served] = {}
        self._rest: dict[str, int] = {}
        self._alone: dict[tuple[int, ...], list[int]] = {}

    # -- engines

    def start(
        self,
        name: str,
        *,
        model: str = "",
        extra: Mapping[str, Any] | None = None,
        kv: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Served:
        """An engine of that name, which may not yet be ready.

        `extra`: what is other in the connector's options; `kv`: a KVTransferConfig in place of ours.
        """
        whole: dict[str, Any] = {
            "rendezvous": "direct",
            "rendezvous_options": {"address": self.address, "secret": self.secret},
            "options": self._options,
        }
        given = dict(extra or {})
        whole["options"] = {**whole["options"], **given.pop("options", {})}
        log = self.folder / f"{name}.log"
        ours = transfer(name, {**whole, **given})
        served = Served(model or self.model, ours if kv is None else kv, self._variables, log, **options)
        self._engines[name] = served
        self._rest.pop(name, None)
        return served

    def engine(self, name: str, **how: Any) -> Served:
        """The one of that name that lives, or a new one; ready."""
        served = self._engines.get(name)
        if served is None or not served.alive:
            served = self.start(name, **how)
        if name not in self._rest:
            served.ready()
            self._rest[name] = served.state()["free"]
        return served

    def engines(self, *names: str, **how: Any) -> Iterator[Served]:
        """Several, which start at the same time."""
        for name in names:
            if name not in self._engines or not self._engines[name].alive:
                self.start(name, **how)
        return iter([self.engine(name) for name in names])

    def at_rest(self, name: str, deadline: float = OVER) -> None:
        """Wait until the engine knows no request and all its blocks are free."""
        served, free = self.engine(name), self._rest[name]
        state = served.settled(free, deadline)
        if state["free"] != free or state["requests"]:
            true = f"It knows {state['requests']} requests, and {state['free']} of {free} blocks are free."
            raise DeadlineExceeded(f"Engine {name} was to be at rest.", f"After {deadline:g} s: {true}", "See its log.")

    def alone(self, prompt: list[int], count: int, name: str) -> list[int]:
        """What an engine says that computes all of it."""
        key = (*prompt, count)
        if key not in self._alone:
            served = self.engine(name)
            served.forget()
            self._alone[key] = served.ask(prompt, count).tokens
            served.forget()
        return self._alone[key]

    # -- where they meet

    def lose_meeting(self) -> None:
        """The rendezvous' process is gone, with all that it knew."""
        self._meeting.close()

    def meet_again(self) -> None:
        """It is back, at the same address, and knows nothing."""
        port = int(self.address.rpartition(":")[2])
        self._meeting = tensorway.create("rendezvous", "direct", {"secret": self.secret, "port": port})

    def close(self) -> None:
        """End all of it."""
        for served in self._engines.values():
            served.close()
        self._meeting.close()


# -- strangers


def listening(pid: int) -> list[tuple[int, int, Any]]:
    """Every socket that a process listens on: family, type, and the address to connect to."""
    mine = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found = _SOCKET.fullmatch(str(link.readlink()))
        except FileNotFoundError:  # closed meanwhile
            continue
        if found:
            mine.add(found[1])
    doors: list[tuple[int, int, Any]] = []
    for table, host in (("tcp", "127.0.0.1"), ("tcp6", "::1")):
        for row in _rows(f"/proc/{pid}/net/{table}"):
            if row[3] == _LISTENS and row[9] in mine:
                family = socket.AF_INET if table == "tcp" else socket.AF_INET6
                doors.append((family, socket.SOCK_STREAM, (host, int(row[1].rpartition(":")[2], 16))))
    for row in _rows(f"/proc/{pid}/net/unix"):
        if row[6] in mine and int(row[3], 16) & _ACCEPTS and len(row) > 7:
            path = row[7]
            doors.append((socket.AF_UNIX, int(row[4], 16), f"\0{path[1:]}" if path.startswith("@") else path))
    return doors


def _rows(file: str) -> list[list[str]]:
    return [line.split() for line in Path(file).read_text(encoding="utf-8").splitlines()[1:]]


def shout(doors: list[tuple[int, int, Any]], numbers: random.Random, *foreign: bytes) -> int:
    """Say what nobody expects at every door: noise, these words, and nothing at all; how many let us in."""
    entered = 0
    for family, kind, address in doors:
        for words in (numbers.randbytes(7), numbers.randbytes(4096), *foreign, b""):
            try:
                with socket.socket(family, kind) as door:
                    door.settimeout(_HEARD)
                    door.connect(address)
                    entered += 1
                    if words:
                        door.sendall(words)
                    door.recv(64)
            except OSError:
                continue  # it was closed before our eyes, or nothing came back: both are answers
    return entered
