"""Shows what remains of a defect of UCX: `python killed_reader.py` ends with how many peers aborted, of three.

A process reads over TCP from a peer that is stopped, and is killed; then the peer goes on, and its UCX takes it for a
fatal error that it cannot send the answer. No option of UCX or of NIXL avoids it. Not a test: it says nothing about us.
"""

from __future__ import annotations

import base64
import signal
import subprocess
import sys
import time

from tensorway.testing import PeerProcess

NBYTES = 32 << 20
OPTIONS: dict[str, object] = {"ucx_tls": ["tcp"]}
READER = f"""
import base64, sys, time
import tensorway
from tensorway.transport import BlockTable
here = tensorway.create("transport", "nixl", {OPTIONS})
region = here.register(bytearray({NBYTES})).regions[0]
peer = here.connect(base64.b64decode(sys.argv[1]))
route = here.prepare(peer, BlockTable.over(region, 1 << 16), BlockTable.over(peer.regions[0], 1 << 16))
print("ready", flush=True)
sys.stdin.readline()
transfers = [here.read(route, range(route.local.count), range(route.local.count)) for _ in range(4)]
print("reading", flush=True)
time.sleep(60)
"""


def aborts() -> bool:
    """Whether a peer ends when its reader was killed."""
    peer = PeerProcess("nixl", OPTIONS)
    peer.register(NBYTES)
    command = [sys.executable, "-c", READER, base64.b64encode(peer.describe()).decode()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        reader.stdout.readline()
        peer.signal(signal.SIGSTOP)
        reader.stdin.write(b"\n")
        reader.stdin.flush()
        reader.stdout.readline()
        time.sleep(0.2)
        reader.kill()
    peer.signal(signal.SIGCONT)
    time.sleep(1)
    try:
        return bool(peer.ask("ping") != peer.pid)
    except (AssertionError, BrokenPipeError):  # it does not answer
        return True
    finally:
        peer.close()


if __name__ == "__main__":
    print(f"{sum(aborts() for _ in range(3))} of 3 peers aborted")
