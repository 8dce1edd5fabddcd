"""A process on a host of the lab: one JSON object a line each way, and a function here per command.

`Actor` is the test's side; run as a script, this is the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import subprocess
import sys
import time
from types import SimpleNamespace

BLOCK = 65_536
SECRET = "a secret of the hosts"
PATIENCE = 60.0


class Refused(Exception):
    """What a command raised over there: the name of its error, and its text."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name


class Actor:
    """A process on a host. `actor.read(deadline=5)` calls the function `read` there."""

    def __init__(self, host, **environment: str) -> None:
        command = host.command(sys.executable, __file__)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **environment}
        )
        self._unread = b""

    def __getattr__(self, do: str):
        if do.startswith("_"):
            raise AttributeError(do)
        return lambda **arguments: self._ask(do, arguments)

    def _ask(self, do: str, arguments: dict):
        self._process.stdin.write(json.dumps({"do": do, "with": arguments}).encode() + b"\n")
        self._process.stdin.flush()
        until = time.monotonic() + PATIENCE
        while b"\n" not in self._unread:
            if not select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"{do} took longer than {PATIENCE:g} s")
            chunk = os.read(self._process.stdout.fileno(), 1 << 20)
            if not chunk:
                raise EOFError(f"the process ended at {do} with {self._process.wait(5)}")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "refused" in answer:
            raise Refused(*answer["refused"])
        return answer["ok"]

    def close(self) -> None:
        """End it; the host ends what is left."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process.stdout.close()


# -- the other side

here = SimpleNamespace(transfer=None)


def choose(policy):
    """The address that a policy gives on this host."""
    from tensorway.rendezvous.hosts import choose

    choice = choose(policy)
    return [choice.advertise, choice.interface]


def serve(policy):
    """Run a rendezvous here."""
    import tensorway

    here.rendezvous = tensorway.create("rendezvous", "direct", {"host": policy, "secret": SECRET})
    return here.rendezvous.address


def enter(address):
    """Enter a rendezvous elsewhere."""
    import tensorway

    here.rendezvous = tensorway.create("rendezvous", "direct", {"address": address, "secret": SECRET})
    return here.rendezvous.list("/") is not None


def join(name, transport, options, nbytes, seed, ttl):
    """Become a member with some memory."""
    import tensorway
    from tensorway.rendezvous.directory import Directory

    here.endpoint = tensorway.create("transport", transport, {"name": name, **options})
    here.memory = bytearray(random.Random(seed).randbytes(nbytes))
    here.region = here.endpoint.register(here.memory).regions[0]
    here.directory = Directory(here.rendezvous, here.endpoint, name, ttl=ttl)
    here.directory.live()


def members():
    """Who is there."""
    return {name: member.state for name, member in here.directory.members().items()}


def connect(name, deadline=30.0):
    """Reach a member, and prepare to read all that it has; returns the lane."""
    from tensorway.transport import BlockTable

    peer = here.directory.connect(name, deadline)
    tables = BlockTable.over(here.region, BLOCK), BlockTable.over(peer.regions[0], BLOCK)
    here.route = here.endpoint.prepare(peer, *tables)
    return peer.lane


def start(deadline, operation="read"):
    """Begin a transfer of all blocks."""
    ids = range(here.route.local.count)
    here.started = time.monotonic()
    here.transfer = getattr(here.endpoint, operation)(here.route, ids, ids, deadline=deadline)
    return here.transfer.state.value


def outcome():
    """Wait for the transfer; what became of it, and after how many seconds."""
    from tensorway.errors import TensorwayError

    try:
        here.transfer.wait()
        error = [None, ""]
    except TensorwayError as raised:
        error = [type(raised).__name__, str(raised)]
    return {"error": error[0], "text": error[1], "seconds": time.monotonic() - here.started}


def released(seconds):
    """Whether the transfer is released by then."""
    until = time.monotonic() + seconds
    while not here.transfer.released and time.monotonic() < until:
        time.sleep(0.01)
    return here.transfer.released


def fill(byte):
    """Overwrite the memory, as an engine does with blocks that it has back."""
    here.memory[:] = bytes([byte]) * len(here.memory)


def holds(byte):
    """How many bytes of the memory are this one."""
    return here.memory.count(byte)


def digest():
    """What the memory holds."""
    return hashlib.blake2b(here.memory).hexdigest()


def variables(names):
    """What the environment says, less what leaked from a launcher."""
    from tensorway.rendezvous.environment import leaked

    return {"leaked": leaked(os.environ), "values": {name: os.environ.get(name) for name in names}}


def outgoing():
    """What a launcher here may copy to other hosts."""
    from tensorway.rendezvous import environment

    return environment.outgoing(os.environ)


def close():
    """Leave."""
    here.directory.close()
    here.endpoint.close()


def main():
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # native libraries print to stdout
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"ok": globals()[command["do"]](**command["with"])}
        except Exception as error:
            answer = {"refused": [type(error).__name__, str(error)]}
        answers.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
