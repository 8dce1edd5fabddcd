"""What the processes on hosts of these tests are told to do; each function has the process's `Rank` first."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import time
from types import SimpleNamespace

from tensorway import settings

BLOCK = 65_536
SECRET = "a secret of the hosts"

#: What this process has made.
here = SimpleNamespace()


def choose(_, policy):
    """The address that a policy gives on this host."""
    from tensorway.rendezvous.hosts import choose

    choice = choose(policy)
    return [choice.advertise, choice.interface]


def serve(_, policy):
    """Run a rendezvous here."""
    import tensorway

    here.rendezvous = tensorway.create("rendezvous", "direct", {"host": policy, "secret": SECRET})
    return here.rendezvous.address


def enter(_, address):
    """Enter a rendezvous elsewhere."""
    import tensorway

    here.rendezvous = tensorway.create("rendezvous", "direct", {"address": address, "secret": SECRET})
    return here.rendezvous.list("/") is not None


def join(_, name, transport, options, nbytes, seed, ttl):
    """Become a member with some memory."""
    import tensorway
    from tensorway.rendezvous.directory import Directory
    from tensorway.testing.peer import allocated

    here.endpoint = tensorway.create("transport", transport, {"name": name, **options})
    content = bytearray(random.Random(seed).randbytes(nbytes))
    here.memory = allocated(content, shared_memory=options.get("contained", False))
    here.region = here.endpoint.register(here.memory).regions[0]
    here.directory = Directory(here.rendezvous, here.endpoint, name, ttl=ttl)
    here.directory.live()


def given(_, policy):
    """What a policy means to libraries on this host."""
    from tensorway.rendezvous import fabrics
    from tensorway.rendezvous.hosts import choose

    return fabrics.variables(choose(policy))


def side_channel(_, name, policy):
    """What a worker does first, and where its engine then listens, which takes what is set as it is."""
    from tensorway.rendezvous import environment, fabrics
    from tensorway.rendezvous.hosts import choose

    dropped = environment.sanitize().names("dropped")
    fabrics.apply(choose(policy))
    with socket.create_server((settings.get(name), 0)) as listener:
        return [dropped, listener.getsockname()[0]]


def members(_):
    """Who is there."""
    return {name: member.state for name, member in here.directory.members().items()}


def connect(_, name, deadline=30.0):
    """Reach a member, and prepare to read all that it has; returns the lane."""
    from tensorway.transport import BlockTable

    peer = here.directory.connect(name, deadline)
    tables = BlockTable.over(here.region, BLOCK), BlockTable.over(peer.regions[0], BLOCK)
    here.route = here.endpoint.prepare(peer, *tables)
    return peer.lane


def start(_, deadline, operation="read"):
    """Begin a transfer of all blocks."""
    ids = range(here.route.local.count)
    here.started = time.monotonic()
    here.transfer = getattr(here.endpoint, operation)(here.route, ids, ids, deadline=deadline)
    return here.transfer.state.value


def outcome(_):
    """Wait for the transfer; what became of it, and after how many seconds."""
    from tensorway.errors import TensorwayError

    try:
        here.transfer.wait()
        error = [None, ""]
    except TensorwayError as raised:
        error = [type(raised).__name__, str(raised)]
    return {"error": error[0], "text": error[1], "seconds": time.monotonic() - here.started}


def fetch(_, name, deadline):
    """Read all that a member has, and raise what goes wrong."""
    connect(_, name, deadline)
    start(_, deadline)
    here.transfer.wait()


def released(_, seconds):
    """Whether the transfer is released by then."""
    until = time.monotonic() + seconds
    while not here.transfer.released and time.monotonic() < until:
        time.sleep(0.01)
    return here.transfer.released


def fill(_, byte):
    """Overwrite the memory, as an engine does with blocks that it has back."""
    here.memory[:] = bytes([byte]) * len(here.memory)


def holds(_, byte):
    """How many bytes of the memory are this one."""
    return bytes(here.memory).count(byte)


def digest(_):
    """What the memory holds."""
    return hashlib.blake2b(here.memory).hexdigest()


def variables(_, names):
    """What the environment says, less what leaked from a launcher."""
    from tensorway.rendezvous.environment import leaked

    return {"leaked": leaked(os.environ), "values": {name: os.environ.get(name) for name in names}}


def outgoing(_):
    """What a launcher here may copy to other hosts."""
    from tensorway.rendezvous import environment

    return environment.outgoing(os.environ)


def close(_):
    """Leave."""
    here.directory.close()
    here.endpoint.close()


def host_name(_):
    """What this host calls itself."""
    return socket.gethostname()


def seconds_to_look_up(_, address):
    """How long it takes to learn that nobody knows the name of an address."""
    began = time.monotonic()
    with contextlib.suppress(socket.gaierror):
        socket.getnameinfo((address, 1), 0)
    return time.monotonic() - began
