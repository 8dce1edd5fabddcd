"""What processes of the tests do until their input ends: `python lives.py WHAT ...` says `ready` when it has begun."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import tempfile
import threading
import time
from pathlib import Path

SECRET = "a secret of the tests"


def wanted():
    """Whether whoever started this is still there, and wants more."""
    return not select.select([sys.stdin], [], [], 0)[0]


def ready(**said):
    print(json.dumps({"ready": True, **said}), flush=True)


@contextlib.contextmanager
def reading(size=1 << 20, block=1 << 14):
    """A route to another process, and how to read all of it."""
    import tensorway
    from tensorway.testing import PeerProcess
    from tensorway.transport import BlockTable

    peer = PeerProcess("local")
    try:
        peer.register(size)
        with tensorway.create("transport", "local") as transport:
            other, here = transport.connect(peer.describe()), transport.register(bytearray(size)).regions[0]
            route = transport.prepare(other, BlockTable.over(here, block), BlockTable.over(other.regions[0], block))
            ids = list(range(size // block))
            yield lambda: transport.read(route, ids, ids).wait(), transport, peer
    finally:
        peer.close()


def moves():
    """Reads, at a pace that no machine has trouble with, and says how much it has read when it ends."""
    with reading() as (read, transport, _):
        read()
        started = time.monotonic()
        ready(endpoint=transport.endpoint_name)
        count = 0
        while wanted():
            read()
            count += 1
            time.sleep(0.01)
        print(json.dumps({"bytes_per_second": (count << 20) / (time.monotonic() - started)}), flush=True)


def loses():
    """Its peer is killed under it."""
    import signal

    from tensorway.errors import TensorwayError

    with reading() as (read, transport, peer):
        read()
        peer.signal(signal.SIGKILL)
        with contextlib.suppress(TensorwayError):
            read()
        ready(endpoint=transport.endpoint_name)
        while wanted():
            time.sleep(0.01)


def holds(address, ttl):
    """Keeps a lease in a rendezvous."""
    import tensorway

    with tensorway.create("rendezvous", "direct", {"address": address, "secret": SECRET}) as rendezvous:
        rendezvous.lease(float(ttl))
        ready()
        while wanted():
            time.sleep(0.01)


def serves():
    """The rendezvous itself."""
    import tensorway

    with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as rendezvous:
        ready(address=rendezvous.address)
        while wanted():
            time.sleep(0.01)


def offloads():
    """Stores blocks in host memory and in files below, and loads them, again and again."""
    import numpy as np

    from tensorway.geometry import Group, Part, Plane, RankGeometry
    from tensorway.offload import OffloadContext, ReqContext, make_offload_key
    from tensorway_cpu.engine import Offloading

    blocks, tokens, width = 32, 16, 2048
    with tempfile.TemporaryDirectory() as folder:
        pages = np.random.default_rng(1).integers(0, 256, (2 * blocks, tokens * width), np.uint8)
        part = Part(0, "k", 0, tokens, width, 0, 1, width, width)
        plane = Plane("layer.0", 0, pages.ctypes.data, tokens * width, tokens * width, len(pages), (part,))
        geometry = RankGeometry((plane,), (Group(tokens),))
        context = OffloadContext("engine-0", "manager", [geometry], facts={"model": "test"})
        options = {"capacity_blocks": blocks, "tiers": [{"backend": "fs", "options": {"folder": folder}}]}
        with Offloading.open(context, options) as offloading:
            ready()
            turn = 0
            while wanted():
                numbers, req = range(blocks * (turn % 2), blocks * (turn % 2 + 1)), ReqContext(f"turn {turn}")
                keys = [make_offload_key(f"block {turn} {number}".encode()) for number in numbers]
                offloading.store(keys, [[page] for page in numbers], req)
                offloading.ended(req)
                while offloading.manager.busy():
                    offloading.manager.poll()
                    time.sleep(1e-3)
                turn += 1
                time.sleep(0.01)


def forks():
    """A child of fork that does nothing, and one that has an endpoint of its own; then the parent ends."""
    import tensorway

    with reading() as (read, _, _):
        read()
        children = []
        for own in (False, True):
            child = os.fork()
            if not child:
                with tensorway.create("transport", "local") if own else contextlib.nullcontext():
                    while wanted():
                        time.sleep(0.01)
                    sys.exit(0)  # with everything that an interpreter does when it ends
            children.append(child)
        ready(children=children)
        while wanted():
            time.sleep(0.01)
        for child in children:
            os.waitpid(child, 0)


def hostile(path, what):
    """A socket that answers what nobody should."""
    import socket

    from tensorway.exports import short

    server = socket.socket(socket.AF_UNIX)
    name = path.replace("PID", str(os.getpid()))
    with short(Path(name)) as bound:
        server.bind(bound)
    server.listen(64)
    ready()

    def answer(connection):
        head = b"HTTP/1.0 200 OK\r\n\r\n"
        with connection, contextlib.suppress(OSError):
            connection.recv(4096)
            if what == "escapes":
                label = "a\\n\x1b[2J\x1b]0;owned\x07\u202e"
                text = f'tensorway_transport_pending{{transport="{label}",endpoint="{label}",peer="x"}} 1\n'
                connection.sendall(head + text.encode())
            elif what == "drips":
                for byte in head + b"tensorway_" * 1000:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.02)
            elif what == "floods":
                while True:
                    connection.sendall(b"tensorway_x 1\n" * 4096)
            elif what == "lies":
                connection.sendall(head + b'tensorway_transport_bytes_total{peer="a"} nan\n')
            elif what == "swells":  # each is a number, and their sum is none
                lines = (f'tensorway_transport_pending{{peer="{peer}"}} 1e308\n' for peer in "ab")
                connection.sendall(head + "".join(lines).encode())
            elif what == "nameless":  # a source that fails, and does not say which
                connection.sendall(head + b"tensorway_source_up 0\n")
            elif what == "swears":
                connection.sendall(b"\x1b[31mNO\r\n\r\n")
            elif what == "hangs":
                time.sleep(60)

    def accept():
        while True:
            threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    while wanted():
        time.sleep(0.01)
    os._exit(0)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
