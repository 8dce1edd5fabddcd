"""Rows that several processes have in common: who makes them, who finds them, and what is left when they are killed."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

import tensorway
from tensorway.errors import DeadlineExceeded, Incompatible, MemoryInvalid, PeerLost
from tensorway.memory import Region
from tensorway.offload import OffloadContext
from tensorway.testing.ranks import RankFailed, Ranks
from tensorway.testing.waiting import eventually
from tensorway_cpu import names, region
from tensorway_cpu.canonical import canonical
from tensorway_cpu.common import CPULoadStoreSpec
from tensorway_cpu.names import stale, sweep
from tensorway_cpu.options import CPUOptions
from tensorway_cpu.pinning import pinned, settle
from tensorway_cpu.region import open_rows
from tensorway_cpu.testing import sides

OPTIONS = {"capacity_blocks": 16}


@pytest.fixture(scope="module", name="processes")
def processes_of_the_module():
    with Ranks(3) as ranks:
        yield ranks
    sweep()


@pytest.fixture(name="three")
def three_fresh_processes(processes):
    processes.grow(3)
    return processes


@pytest.fixture(name="folder")
def own_folder(tmp_path, monkeypatch):
    """Names are below a folder that no other test sees."""
    monkeypatch.setattr(names, "_SHARED", tmp_path)
    return tmp_path


def fresh():
    return f"engine-{uuid.uuid4().hex}"


def context(engine, role="manager", rank=0, ranks=1, deadline=5.0, **more):
    return OffloadContext(engine, role, sides.engine_pages(ranks).geometries, rank, deadline=deadline, **more)


def rows_of(about, **options):
    canon = canonical(about.ranks, about.pages_per_block, "NHD")
    return open_rows(CPUOptions(**{**OPTIONS, **options}), about, canon)


def listed(folder):
    return [path.name for path in folder.iterdir()]


# -- in processes of their own


@pytest.mark.parametrize("first", ["manager", "worker"])
def test_a_manager_and_two_workers_share_rows_in_three_processes(three, first):
    engine = fresh()
    order = [("manager", 0, 0), ("worker", 0, 1), ("worker", 1, 2)]
    for role, number, process in order if first == "manager" else order[::-1]:
        three[process].call(sides.open_side, engine, role, number, 2, OPTIONS)
    for process in (1, 2):
        three[process].call(sides.fill, [3, 1, 4], 7)

    stored = three[0].call(sides.prepare, "store", [1, 2, 3])
    for process in (1, 2):
        assert "" == three[process].call(sides.carry_out, "store", stored.target, [3, 1, 4]).cause
    three[0].call(sides.complete, "store", stored.ticket)
    loaded = three[0].call(sides.prepare, "load", [1, 2, 3])
    for process in (1, 2):
        three[process].call(sides.forget_pages)
        assert "" == three[process].call(sides.carry_out, "load", loaded.source, [9, 8, 30]).cause

    assert [0, 0] == [three[process].call(sides.wrong_bytes, [9, 8, 30], 7) for process in (1, 2)]
    assert [] == [path for path in stale() if names.name_of(engine) in path.name]
    assert not (names.folder_of_names() / names.name_of(engine)).exists(), (
        "all have joined, and the name is still there"
    )
    for process in (0, 1, 2):
        three[process].call(sides.close_side)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_leaves_the_others_their_rows(three, victim):
    """Also if it made them: the kernel frees memory with its last process."""
    engine = fresh()
    for role, number, process in (("manager", 0, 0), ("worker", 0, 1), ("worker", 1, 2)):
        three[process].call(sides.open_side, engine, role, number, 2, OPTIONS)
    stored = three[0].call(sides.prepare, "store", [5])
    three[2].call(sides.fill, [6], 3)
    three[2].call(sides.carry_out, "store", stored.target, [6])

    three[victim].signal(signal.SIGKILL)
    three[2].call(sides.forget_pages)
    three[2].call(sides.carry_out, "load", stored.target, [6])

    assert 0 == three[2].call(sides.wrong_bytes, [6], 3)
    three[2].call(sides.close_side)


def test_what_a_killed_process_left_is_swept_at_the_next_start_and_what_is_held_is_not(three):
    killed, alive = fresh(), fresh()
    three[0].call(sides.open_side, killed, "manager", 0, 2, OPTIONS)
    three[1].call(sides.open_side, alive, "manager", 0, 2, OPTIONS)
    folder = names.folder_of_names()
    paths = [folder / names.name_of(engine) for engine in (killed, alive)]
    assert [True, True] == [path.exists() for path in paths]

    three[0].signal(signal.SIGKILL)
    # Tests beside this one sweep the same folder: one of them may hold it for a moment, or have swept it.
    eventually(lambda: paths[0] in stale() or not paths[0].exists())
    assert paths[1] not in stale()
    rows = rows_of(context(fresh()))

    assert [False, True] == [path.exists() for path in paths]
    rows.close()
    three[1].call(sides.close_side)
    sweep()


def test_who_looks_for_rows_of_a_killed_process_makes_them_anew(three):
    engine = fresh()
    three[0].call(sides.open_side, engine, "manager", 0, 2, OPTIONS)
    three[0].signal(signal.SIGKILL)

    three[1].call(sides.open_side, engine, "worker", 0, 2, OPTIONS)

    three[1].call(sides.close_side)
    sweep()


def test_a_worker_whose_maker_is_gone_while_another_holds_the_name_is_told(three):
    engine = fresh()
    three[0].call(sides.open_side, engine, "manager", 0, 2, OPTIONS)
    three[1].call(sides.open_side, engine, "worker", 0, 2, OPTIONS)
    three[0].signal(signal.SIGKILL)

    with pytest.raises(RankFailed, match="PeerLost"):
        three[2].call(sides.open_side, engine, "worker", 1, 2, OPTIONS)

    three[1].call(sides.close_side)
    sweep()


def test_a_forked_child_may_not_use_the_worker_and_harms_nothing_by_ending(three):
    three[0].call(sides.open_side, fresh(), "worker", 0, 1, OPTIONS)
    three[0].call(sides.fill, [2], 5)

    assert "Closed" == three[0].call(sides.in_child)

    stored = CPULoadStoreSpec.of([4])
    three[0].call(sides.carry_out, "store", stored, [2])
    three[0].call(sides.forget_pages)
    three[0].call(sides.carry_out, "load", stored, [2])
    assert 0 == three[0].call(sides.wrong_bytes, [2], 5)
    three[0].call(sides.close_side)
    sweep()


# -- names


def test_the_name_is_this_users_own_and_says_nothing_of_the_engine(folder):
    rows = rows_of(context("../../etc/engine", ranks=2))

    (name,) = listed(folder)
    assert "etc" not in name
    assert 0o600 == stat.S_IMODE((folder / name).stat().st_mode)
    assert (folder / name).stat().st_size < 4096, "rows are not in it"
    rows.close()
    assert [] == listed(folder), "the last one to go has left it"


def test_the_same_place_twice_is_refused(folder):
    engine = fresh()
    rows = rows_of(context(engine, ranks=2))

    with pytest.raises(MemoryInvalid, match="has been there as the manager"):
        rows_of(context(engine, ranks=2))
    other = rows_of(context(engine, "worker", 1, ranks=2))
    with pytest.raises(MemoryInvalid, match="has been there as rank 1"):
        rows_of(context(engine, "worker", 1, ranks=2))

    rows.close()
    other.close()


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({"facts": {"model": "other"}}, {}, "layout and facts"),
        ({"pages_per_block": 2}, {}, "layout and facts"),
        ({}, {"capacity_blocks": 17}, "number of rows is 17|number of rows"),
    ],
)
def test_processes_that_differ_are_told_in_what(folder, change, options, says):
    engine = fresh()
    rows = rows_of(context(engine, ranks=2))

    with pytest.raises(Incompatible, match=says):
        rows_of(context(engine, "worker", 0, ranks=2, **change), **options)

    rows.close()


def test_what_the_first_one_took_all_take_who_say_nothing(folder):
    engine = fresh()
    first = rows_of(context(engine, ranks=2))

    second = rows_of(context(engine, "worker", 0, ranks=2), capacity_blocks=None)

    assert 16 == first.blocks == second.blocks
    first.row(3, 8)[:] = b"together"
    assert b"together" == bytes(second.row(3, 8))
    first.close()
    second.close()


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"TWROWS\x00\x01", b"\xff" * 4096, b"TWROWS\x00\x01" + b"\xff" * 200, b"TWROWS\x00\x01" + bytes(200)],
)
def test_a_name_with_anything_in_it_is_refused_or_swept_and_never_believed(folder, data):
    engine = fresh()
    path = folder / names.name_of(engine)
    path.write_bytes(data)
    path.chmod(0o600)
    holder = os.open(path, os.O_RDWR)
    names.hold(holder)

    with pytest.raises(MemoryInvalid):
        rows_of(context(engine))

    os.close(holder)
    rows = rows_of(context(engine))
    rows.close()


@pytest.mark.parametrize("place", range(8, region._HEADER.size))
def test_a_header_that_was_changed_anywhere_is_never_mapped_wrongly(folder, place):
    engine = fresh()
    rows = rows_of(context(engine, ranks=2))
    path = folder / names.name_of(engine)
    data = bytearray(path.read_bytes())
    data[place] ^= 0x41
    path.write_bytes(data)

    try:
        other = rows_of(context(engine, "worker", 0, ranks=2, deadline=0.2), capacity_blocks=None)
    except (Incompatible, MemoryInvalid, PeerLost):
        pass
    else:  # what is between the numbers, and says nothing
        assert (other.blocks, other.row_bytes) == (rows.blocks, rows.row_bytes)
        rows.row(1, 1)[:] = b"!"
        assert b"!" == bytes(other.row(1, 1))
        other.close()
    rows.close()


def test_another_process_of_the_same_number_is_not_who_made_the_rows(folder):
    engine = fresh()
    rows = rows_of(context(engine, ranks=2))
    path = folder / names.name_of(engine)
    said = list(region._HEADER.unpack_from(path.read_bytes()))
    said[2] += 1  # when it began
    path.write_bytes(region._HEADER.pack(*said) + path.read_bytes()[region._HEADER.size :])

    with pytest.raises(PeerLost, match="is gone"):
        rows_of(context(engine, "worker", 0, ranks=2))

    rows.close()


def test_another_file_of_the_same_number_is_not_the_rows(folder):
    engine = fresh()
    rows = rows_of(context(engine, ranks=2))
    other = tensorway.memory.shared(rows.memory.nbytes)
    path = folder / names.name_of(engine)
    said = list(region._HEADER.unpack_from(path.read_bytes()))
    said[3] = tensorway.memory.SharedFile.of(Region.of(other))[0].number
    path.write_bytes(region._HEADER.pack(*said) + path.read_bytes()[region._HEADER.size :])

    with pytest.raises(PeerLost, match="has closed them"):
        rows_of(context(engine, "worker", 0, ranks=2))

    rows.close()


def test_a_link_in_place_of_the_name_is_not_followed(folder):
    engine = fresh()
    (folder / "target").write_bytes(b"precious")
    (folder / names.name_of(engine)).symlink_to(folder / "target")

    with pytest.raises(MemoryInvalid):
        rows_of(context(engine))

    assert b"precious" == (folder / "target").read_bytes()


def test_a_name_that_others_may_write_to_is_refused(folder):
    engine = fresh()
    rows = rows_of(context(engine, ranks=2))
    (folder / names.name_of(engine)).chmod(0o666)

    with pytest.raises(MemoryInvalid, match="others may write"):
        rows_of(context(engine, "worker", 0, ranks=2))

    rows.close()


def test_who_cannot_get_a_hold_gives_up_in_time(folder):
    engine = fresh()
    holder = os.open(folder / names.name_of(engine), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(holder, fcntl.LOCK_EX)

    with pytest.raises(DeadlineExceeded):
        rows_of(context(engine, "worker", 0, ranks=2, deadline=0.1))

    os.close(holder)


def test_of_several_who_come_at_once_one_makes_rows_and_all_have_them(folder):
    for _ in range(12):
        engine, barrier = fresh(), threading.Barrier(5)
        places = [("manager", 0), *(("worker", rank) for rank in range(4))]
        abouts = [context(engine, role, rank, ranks=4, deadline=60.0) for role, rank in places]

        def arrive(about, barrier=barrier):
            barrier.wait()
            return rows_of(about)

        with ThreadPoolExecutor(5) as pool:
            all_of = list(pool.map(arrive, abouts))

        all_of[0].row(15, 4)[:] = b"once"
        assert {b"once"} == {bytes(rows.row(15, 4)) for rows in all_of}
        assert [] == listed(folder)
        for rows in all_of:
            rows.close()


def test_a_folder_that_takes_no_file_is_told(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MemoryInvalid, match="No space left"):
        rows_of(context(fresh()))
    assert [] == listed(folder)


# -- memory


def test_more_than_the_process_may_have_is_refused_before_it_is_touched(folder):
    with pytest.raises(MemoryInvalid, match="this process may have"):
        rows_of(context(fresh()), capacity_blocks=1 << 40)
    assert [] == listed(folder)


def test_too_little_for_one_block_is_refused(folder):
    engine = sides.engine_pages(1)
    canon = canonical(engine.geometries, 16, "NHD")
    assert canon.row_bytes > 4096

    with pytest.raises(MemoryInvalid, match="room for none"):
        open_rows(CPUOptions(capacity_bytes=4096), context(fresh(), pages_per_block=16), canon)


def test_a_limit_of_the_process_is_told_and_leaves_no_name(three):
    engine = fresh()

    said = three[0].call(sides.open_under_limit, engine, 1 << 30)

    assert said.startswith("MemoryInvalid") and "Cannot allocate memory" in said
    assert not (names.folder_of_names() / names.name_of(engine)).exists()


def test_all_memory_is_taken_at_once_where_asked_and_no_more_than_there_is_time_for(folder):
    rows = rows_of(context(fresh()), populate=True)
    rows.row(15, 1)[:] = b"x"
    rows.close()
    with pytest.raises(DeadlineExceeded):
        settle(tensorway.memory.shared(1 << 20), huge_pages=True, populate=True, until=0.0)


def test_rows_that_somebody_may_still_write_to_stay_mapped(folder):
    rows = rows_of(context(fresh()))
    where = rows.memory.address
    kept = len(region._kept)

    rows.close(still_used=True)
    rows.close()

    assert kept + 1 == len(region._kept)
    assert where == Region.of(region._kept[-1]).address
    assert where in tensorway.memory._files
    region._kept.pop()
    del rows
    assert where not in tensorway.memory._files


def test_memory_is_pinned_in_pieces_of_whole_rows_or_not_at_all(monkeypatch):
    monkeypatch.setattr("tensorway_cpu.pinning._PINNED", 10_000)
    where, calls = Region(1 << 30, 40_960), []

    def register(address, nbytes):
        calls.append((address - where.address, nbytes))
        return 2 if address - where.address >= limit else 0

    limit = 1 << 40
    done = pinned(where, 4096, register, lambda address: calls.append(address - where.address) or 0)
    assert [(0, 8192), (8192, 8192), (16384, 8192), (24576, 8192), (32768, 8192)] == calls
    calls.clear()
    done.undo()
    done.undo()
    assert [32768, 24576, 16384, 8192, 0] == calls

    calls.clear()
    limit = 16384
    with pytest.raises(MemoryInvalid, match="with code 2"):
        pinned(where, 4096, register, lambda address: calls.append(address - where.address) or 0)
    assert [(0, 8192), (8192, 8192), (16384, 8192), 8192, 0] == calls


def test_pinning_is_refused_where_there_is_no_device_to_pin_for(folder):
    with pytest.raises(MemoryInvalid, match="no torch with CUDA"):
        rows_of(context(fresh()), pin=True)
    assert [] == listed(folder)
