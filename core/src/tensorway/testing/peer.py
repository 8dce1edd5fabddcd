"""A peer in a process of its own, for suites: driven line by line, so that it can be killed and stopped for real.

Room `testing`. `PeerProcess` is this side; `python -m tensorway.testing.peer NAME OPTIONS [shared]` is the other. One
JSON object a line each way.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from tensorway.memory import shared
from tensorway.testing.stops import children, send

#: Seconds that a peer may take for one command; starting one imports the transport's library.
PATIENCE: Final = 60.0


class PeerProcess:
    """Another process with one endpoint. Every call has a deadline; `close` leaves nothing behind."""

    def __init__(
        self, transport: str, options: dict[str, object] | None = None, *, shared_memory: bool = False
    ) -> None:
        how = [transport, json.dumps(options or {}), *(["shared"] if shared_memory else [])]
        command = [sys.executable, "-m", "tensorway.testing.peer", *how]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._unread = b""
        self.ask("ping")

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def register(self, nbytes: int, seed: int = 0) -> int:
        """Register memory with content that `content(seed, nbytes)` tells; returns the region's number."""
        return int(self.ask("register", nbytes=nbytes, seed=seed))

    def deregister(self, region: int) -> None:
        """Deregister a region."""
        self.ask("deregister", region=region)

    def describe(self) -> bytes:
        """Its description, with all that is registered now."""
        return base64.b64decode(self.ask("describe"))

    def connect(self, description: bytes) -> None:
        """Let it connect here."""
        self.ask("connect", description=base64.b64encode(description).decode())

    def notify(self, payload: bytes, times: int = 1) -> None:
        """Let it send a notification to the endpoint that it connected to last."""
        self.ask("notify", payload=base64.b64encode(payload).decode(), times=times)

    def digest(self, region: int) -> str:
        """A digest of what a region holds now."""
        return str(self.ask("digest", region=region))

    def notifications(self, count: int, seconds: float = 10.0) -> list[dict[str, str]]:
        """Wait for so many notifications.

        Each with its payload, and digests of all regions at the moment it was seen.
        """
        return list(self.ask("notifications", count=count, seconds=seconds))

    def ask(self, do: str, **arguments: object) -> Any:
        """One command and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        answer = json.loads(self._line())
        assert "error" not in answer, answer
        return answer["ok"]

    def signal(self, number: int) -> None:
        """Stop it, let it go on, or kill it."""
        helpers = [Path(f"/proc/{child}/maps") for child in children(self.pid)] if number == signal.SIGKILL else []
        send(self._process, number)
        if number == signal.SIGKILL:
            self._process.wait(PATIENCE)
            # A mover ends a moment after its engine, and answers until then.
            deadline = time.monotonic() + PATIENCE
            while any(map(_mapped, helpers)) and time.monotonic() < deadline:
                time.sleep(0.002)

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(PATIENCE)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass  # what was in the pipe is nobody's any more

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        fd, deadline = self._process.stdout.fileno(), time.monotonic() + PATIENCE
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            assert left > 0, f"the peer did not answer within {PATIENCE:g} s"
            if select.select([fd], [], [], left)[0]:
                chunk = os.read(fd, 1 << 20)
                assert chunk, f"the peer ended with {self._process.poll()}"
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line


def _mapped(maps: Path) -> bool:
    """Whether a process still has memory: it has none from its end on, reaped or not."""
    try:
        return bool(maps.read_bytes())
    except OSError:
        return False


def content(seed: int, nbytes: int) -> bytearray:
    """What a region that was registered with this seed holds."""
    return bytearray(random.Random(seed).randbytes(nbytes))


def allocated(data: bytearray, *, shared_memory: bool) -> Any:
    """The same bytes in memory that can be registered: shared for a transport that asks for that, else as they are."""
    if not shared_memory:
        return data
    buffer = shared(len(data))
    buffer[:] = data
    return buffer


def digest(data: bytes | bytearray | memoryview) -> str:
    """A digest of bytes, as a peer gives it of its regions."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class _Servant:
    """The other side: one endpoint, and a method per command."""

    def __init__(self, transport: str, options: dict[str, object], shared_memory: bool) -> None:
        import tensorway

        self.endpoint = tensorway.create("transport", transport, options)
        self.shared_memory = shared_memory
        self.memory: list[Any] = []
        self.registrations: list[Any] = []
        self.peer: Any = None

    def ping(self) -> int:
        return os.getpid()

    def register(self, nbytes: int, seed: int) -> int:
        self.memory.append(allocated(content(seed, nbytes), shared_memory=self.shared_memory))
        self.registrations.append(self.endpoint.register(self.memory[-1]))
        return len(self.memory) - 1

    def deregister(self, region: int) -> None:
        self.registrations[region].close()

    def describe(self) -> str:
        return base64.b64encode(self.endpoint.describe()).decode()

    def connect(self, description: str) -> None:
        self.peer = self.endpoint.connect(base64.b64decode(description))

    def notify(self, payload: str, times: int) -> None:
        for _ in range(times):
            self.endpoint.notify(self.peer, base64.b64decode(payload))

    def digest(self, region: int) -> str:
        return digest(self.memory[region])

    def notifications(self, count: int, seconds: float) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []
        deadline = time.monotonic() + seconds
        while len(seen) < count and time.monotonic() < deadline:
            for note in self.endpoint.notifications():
                payload = base64.b64encode(note.payload).decode()
                digests = [digest(data) for data in self.memory] if count <= 8 else []
                seen.append({"payload": payload, "peer": note.peer, "digests": digests})
            time.sleep(0.001)
        return seen


def main() -> None:
    """Serve commands from stdin until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # native libraries print to stdout, and that is the channel of the answers
    servant = _Servant(sys.argv[1], json.loads(sys.argv[2]), "shared" in sys.argv[3:])
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"ok": getattr(servant, command.pop("do"))(**command)}
        except Exception as error:  # it goes to the test, which shows it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
