"""What `tensorway demo` shows of offloading: blocks that outlive the engine that computed them.

Of the dist nothing else imports this module; it may import all of the dist, and, being for the command line, the core's
demo. An engine stores its blocks, loads them again, and is killed; another one finds them in files. Functions with a
`Rank` first are called in the processes of the engines.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

import tensorway
from tensorway.cli.demonstration import Ratio, Shown, Stage, memmove
from tensorway.errors import DeadlineExceeded
from tensorway.geometry import Group, Part, Plane, RankGeometry
from tensorway.offload import OffloadContext, OffloadKey, ReqContext, make_offload_key
from tensorway.testing.ranks import Rank, RankProcess
from tensorway_cpu.engine import Offloading
from tensorway_offload.command.replay import chart, compared
from tensorway_offload.testing.traces import chats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tensorway.cli.charts import Chart

_BLOCKS: Final = 256
_TOKENS: Final = 16
_WIDTH: Final = 2048
_NBYTES: Final = _BLOCKS * 2 * _TOKENS * _WIDTH
#: Of the trace that policies are compared with, and of what.
_REQUESTS: Final = 1000
_CAPACITIES: Final = ("1%", "2%", "5%", "10%", "20%", "40%")


@attrs.frozen
class Went:
    """What one engine says of its blocks."""

    right: bool
    storing: float = 0.0
    loading: float = 0.0


def show(stage: Stage) -> Shown:
    """What the entry point refers to."""
    files = tensorway.decide("offload_tier", "fs").winner is not None
    with tempfile.TemporaryDirectory(prefix="tensorway-demo-") if files else contextlib.nullcontext() as folder:
        stage.say(0.0, f"an engine stores {_BLOCKS} blocks in host memory{' and files' if files else ''}")
        first = _in_process(stage, store, folder)
        second = None
        if files:
            stage.say(0.3, "it is killed; another engine loads the blocks from files")
            second = _in_process(stage, load, folder)
    picture = _hit_ratios(stage)
    copy = memmove(_NBYTES)
    ratios = [
        Ratio("loading from host memory", "a memmove", first.loading, copy),
        Ratio("storing in host memory", "a memmove", first.storing, copy),
    ]
    text = f"An engine stored {_BLOCKS} blocks in host memory, and loaded them again."
    if second is not None:
        ratios.insert(0, Ratio("loading from files", "a memmove", second.loading, copy))
        text += " Then it was killed, and another engine loaded them from files."
    moved = _NBYTES * (3 if second else 2)
    right = first.right and (second is None or second.right)
    headline = ratios[0].text, f"a memmove, from {'files' if files else 'memory'}"
    return Shown("cpu, fs" if files else "cpu", 1 + files, moved, right, headline, text, tuple(ratios), (picture,))


def _in_process(stage: Stage, what: Callable[..., Went], folder: str | None) -> Went:
    """Let an engine in a process of its own do this; then that is killed, whatever it still wants to do."""
    with stage.processes(), contextlib.closing(RankProcess("")) as process:
        seconds = stage.left()
        went: Went = process.call(what, folder, seconds, seconds=seconds)
        return went


def _hit_ratios(stage: Stage) -> Chart:
    """The policy that `auto` takes beside the best that could be, for a trace that is made up: conversations."""
    winner = tensorway.decide("eviction_policy").winner
    policy = "lru" if winner is None else winner.name

    def step(what: str, requests: int) -> Callable[[int], None]:
        stage.left()
        return lambda done: None

    requests = chats(random.Random(1), _REQUESTS // (4 if stage.quick else 1))
    stage.say(0.6, f"hit ratio of {policy} with {len(requests)} requests, by capacity")
    return chart(compared(requests, (policy,), _CAPACITIES, step))


# -- in the process of an engine


def store(rank: Rank, folder: str | None, seconds: float) -> Went:
    """Store blocks, overwrite their pages, and load them again."""
    until, pages = time.monotonic() + seconds, _content()
    with _opened(folder, pages) as offloading:
        req, keys = ReqContext("stored"), _keys()
        started = time.perf_counter()
        offloading.store(keys, [[page] for page in range(_BLOCKS)], req, seconds)
        storing = time.perf_counter() - started
        _settle(offloading, req, until)
        right, loading = _loaded(offloading, pages)
    return Went(right, storing, loading)


def load(rank: Rank, folder: str, seconds: float) -> Went:
    """Load what another engine has stored."""
    pages = _content()
    with _opened(folder, pages) as offloading:
        right, loading = _loaded(offloading, pages)
    return Went(right, loading=loading)


def _content() -> NDArray[np.uint8]:
    """Pages as an engine has computed them: the same ones in every process."""
    return np.random.default_rng(1).integers(0, 256, (_BLOCKS, 2, _TOKENS, _WIDTH), np.uint8)


def _opened(folder: str | None, pages: NDArray[np.uint8]) -> Offloading:
    tiers = [{"backend": "fs", "options": {"folder": folder}}] if folder else []
    context = OffloadContext("demo", "manager", [_geometry(pages)], facts={"model": "demo"})
    # What comes from files passes through rows of host memory, of which one request may have a share only.
    return Offloading.open(context, {"capacity_blocks": 2 * _BLOCKS, "tiers": tiers})


def _loaded(offloading: Offloading, pages: NDArray[np.uint8]) -> tuple[bool, float]:
    """Overwrite all pages, and load them; whether every byte is as it was, and how long that took."""
    before, done = pages.copy(), 0
    pages[:] = 0
    req, keys = ReqContext("loaded"), _keys()
    started = time.perf_counter()
    while ready := offloading.prefix(keys[done:], req):  # a request has a share of the rows at once
        numbers = range(done, done + ready)
        good = offloading.load(keys[done : done + ready], [[page] for page in numbers], req)
        done += good
        if good < ready or done == len(keys):
            break
    seconds = time.perf_counter() - started
    offloading.ended(req)
    return done == len(keys) and bool(np.array_equal(before, pages)), seconds


def _settle(offloading: Offloading, req: ReqContext, until: float) -> None:
    """The request has ended; what is on its way to files arrives there."""
    offloading.ended(req)
    while offloading.manager.busy():
        if time.monotonic() > until:
            true = "Blocks are on their way to files, and have not arrived in the time that was given."
            raise DeadlineExceeded("Blocks were to be stored.", true, "See whether the disk is busy: TMPDIR.")
        offloading.manager.poll()
        time.sleep(1e-3)


def _keys() -> list[OffloadKey]:
    return [make_offload_key(f"demo block {number:8}".encode()) for number in range(_BLOCKS)]


def _geometry(pages: NDArray[np.uint8]) -> RankGeometry:
    """Of a rank with one layer: of each page first the keys, then the values."""
    half = _TOKENS * _WIDTH
    parts = tuple(Part(0, name, at, _TOKENS, _WIDTH, 0, 1, _WIDTH, _WIDTH) for name, at in (("k", 0), ("v", half)))
    plane = Plane("layer.0", 0, pages.ctypes.data, 2 * half, 2 * half, len(pages), parts)
    return RankGeometry((plane,), (Group(_TOKENS),))
