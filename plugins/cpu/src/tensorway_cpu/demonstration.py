"""What `tensorway demo` shows of offloading: an engine whose blocks go to host memory and files, and come back.

Of the dist nothing else imports this module; it may import all of the dist, and, being for the command line, the core's
demo and its `Output`.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from typing import TYPE_CHECKING, Final

import numpy as np

import tensorway
from tensorway.cli.demonstration import Offloaded
from tensorway.geometry import Group, Part, Plane, RankGeometry
from tensorway.offload import OffloadContext, OffloadKey, ReqContext, make_offload_key
from tensorway_cpu.engine import Offloading

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tensorway.cli.output import Output

#: Blocks of each of two requests: with files below there is room for one of them in host memory, else for both.
_BLOCKS: Final = 128
_TOKENS: Final = 16
_WIDTH: Final = 2048


def show(out: Output) -> Offloaded:
    """What the entry point refers to."""
    files = tensorway.decide("offload_tier", "fs").winner is not None
    with tempfile.TemporaryDirectory() if files else contextlib.nullcontext() as folder:
        rows = _BLOCKS if files else 2 * _BLOCKS
        tiers = [{"backend": "fs", "options": {"folder": folder}}] if files else []
        where = "and files below" if files else "and nothing below"
        out.progress(f"    two requests of {_BLOCKS} blocks, {rows} rows of host memory, {where}")
        pages = np.random.default_rng(1).integers(0, 256, (2 * _BLOCKS, 2, _TOKENS, _WIDTH), np.uint8)
        context = OffloadContext("demo", "manager", [_geometry(pages)], facts={"model": "demo"})
        with Offloading.open(context, {"capacity_blocks": rows, "tiers": tiers}) as offloading:
            return _through(offloading, pages, tuple(str(tier["backend"]) for tier in tiers))


def _through(offloading: Offloading, pages: NDArray[np.uint8], tiers: tuple[str, ...]) -> Offloaded:
    """Store both requests, give their pages to nobody, and load both again."""
    before, took = pages.copy(), [0.0, 0.0]
    requests = [range(_BLOCKS), range(_BLOCKS, 2 * _BLOCKS)]
    for number, numbers in enumerate(requests):
        started = time.perf_counter()
        req = ReqContext(f"stored {number}")
        offloading.store(_keys(numbers), [[page] for page in numbers], req)
        took[0] += time.perf_counter() - started
        _settle(offloading, req)
    pages[:] = 0
    loaded = 0
    for number, numbers in enumerate(requests):
        started = time.perf_counter()
        req, keys, done = ReqContext(f"loaded {number}"), _keys(numbers), 0
        while ready := offloading.prefix(keys[done:], req):  # a request has a share of the rows at once
            some = slice(done, done + ready)
            good = offloading.load(keys[some], [[page] for page in numbers[some]], req)
            done += good
            if good < ready or done == len(keys):
                break
        loaded += done
        took[1] += time.perf_counter() - started
        _settle(offloading, req)
    same = loaded == len(pages) and bool(np.array_equal(before, pages))
    return Offloaded("cpu", tiers, len(pages), pages.nbytes, same, *took)


def _settle(offloading: Offloading, req: ReqContext, deadline: float = 30.0) -> None:
    """The request has ended; what is on its way to files may arrive there."""
    offloading.ended(req)
    until = time.monotonic() + deadline
    while offloading.manager.busy() and time.monotonic() < until:
        offloading.manager.poll()
        time.sleep(1e-3)


def _keys(numbers: range) -> list[OffloadKey]:
    return [make_offload_key(f"demo block {number:8}".encode()) for number in numbers]


def _geometry(pages: NDArray[np.uint8]) -> RankGeometry:
    """Of a rank with one layer: of each page first the keys, then the values."""
    half = _TOKENS * _WIDTH
    parts = tuple(Part(0, name, at, _TOKENS, _WIDTH, 0, 1, _WIDTH, _WIDTH) for name, at in (("k", 0), ("v", half)))
    plane = Plane("layer.0", 0, pages.ctypes.data, 2 * half, 2 * half, len(pages), parts)
    return RankGeometry((plane,), (Group(_TOKENS),))
