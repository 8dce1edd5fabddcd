"""Managers and workers in processes of their own. Functions with a `Rank` first are called there.

May import the core, its `testing` and this package. Whoever comes first makes the rows; the test says who that is.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import tensorway
from tensorway.errors import TensorwayError
from tensorway.offload import EngineSpec, LoadStoreSpec, OffloadContext, ReqContext, TransferResult, make_offload_key
from tensorway.testing.ranks import Rank
from tensorway_cpu.testing.engines import Pages
from tensorway_kv.layouts import Cache, Parallel, attention

CACHES: Final = (Cache([0, 1], attention(4, 16), 4),)
REQUEST: Final = ReqContext("request")
PATIENCE: Final = 60.0


def engine_pages(ranks: int) -> Pages:
    """The pages of an engine, all ranks of which say the same of themselves."""
    return Pages.of(CACHES, Parallel(ranks))


def open_side(
    rank: Rank, engine: str, role: Literal["manager", "worker"], number: int, ranks: int, options: dict[str, Any]
) -> None:
    """Be the manager, or the worker of a rank."""
    pages = rank.notes["pages"] = engine_pages(ranks)
    context = OffloadContext(engine, role, pages.geometries, number, deadline=PATIENCE)
    rank.notes["side"], rank.notes["number"] = tensorway.create("offloading", "cpu", options, context), number


def prepare(rank: Rank, what: str, names: Sequence[int]) -> Any:
    """What a manager says of blocks with these names."""
    keys = [make_offload_key(name.to_bytes(8, "big")) for name in names]
    manager = rank.notes["side"]
    if what == "load":
        assert len(keys) == manager.lookup_prefix(keys, REQUEST).ready
    return getattr(manager, f"prepare_{what}")(keys, REQUEST)


def complete(rank: Rank, what: str, ticket: Any) -> None:
    """It is done."""
    getattr(rank.notes["side"], f"complete_{what}")(ticket)


def fill(rank: Rank, ids: Sequence[int], salt: int) -> None:
    """A request has computed what is in these pages."""
    held = rank.notes["pages"]
    held.clear()
    held.fill([ids], 4 * len(ids), salt)


def carry_out(rank: Rank, what: str, spec: LoadStoreSpec, ids: Sequence[int]) -> TransferResult:
    """Copy a page for each row."""
    worker, pages = rank.notes["side"], EngineSpec([0] * len(ids), [[page] for page in ids])
    job = rank.notes["job"] = rank.notes.get("job", 0) + 1
    sides = (pages, spec) if what == "store" else (spec, pages)
    getattr(worker, what)(job, *sides)
    worker.wait([job], PATIENCE)
    (result,) = worker.poll()
    return result  # type: ignore[no-any-return]


def wrong_bytes(rank: Rank, ids: Sequence[int], salt: int) -> int:
    """How many bytes of the rank's own memory are not what they would be if these pages had been loaded."""
    held, number = rank.notes["pages"], rank.notes["number"]
    expected = held.expected([ids], range(4 * len(ids)), salt)[number]
    return int((held.ranks[number].memory != expected).sum())


def forget_pages(rank: Rank) -> None:
    """All pages are junk."""
    rank.notes["pages"].clear()


def close_side(rank: Rank) -> None:
    """End it."""
    rank.notes.pop("side").close()


def in_child(rank: Rank) -> str:
    """What a forked child is told that uses the worker; the child closes it as well, as an exit would."""
    worker, (here, there) = rank.notes["side"], os.pipe()
    child = os.fork()
    if not child:
        try:
            worker.poll()
            said = "nothing"
        except BaseException as error:
            said = type(error).__name__
        worker.close()
        os.write(there, said.encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(here, 100).decode()


def open_under_limit(rank: Rank, engine: str, nbytes: int) -> str:
    """What who makes rows is told if so many bytes are more than the process may map."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + nbytes // 2, before[1]))
    try:
        open_side(rank, engine, "manager", 0, 1, {"capacity_bytes": nbytes})
    except TensorwayError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return "nothing"
