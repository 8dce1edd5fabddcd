"""Rows of an expert: moved as a plan says, in its order, all tensors together; and digests that see every byte."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tensorway import memory
from tensorway.eplb import ExpertLayout, Staging
from tensorway.errors import Unsupported
from tensorway.memory import Region
from tensorway_eplb.rows import UNKNOWN, Rows, copy_on_host, digest

SLOTS = 4
TENSORS = {"scale": 8, "w13": 256, "w2": 128}


class Device:
    """A tensor on an accelerator, by its word."""

    shape, dtype = (SLOTS, 8), "u8"

    class device:
        type, index = "cuda", 0

    def stride(self):
        return (8, 1)

    def element_size(self):
        return 1

    def data_ptr(self):
        return 0x10000


class World:
    """One rank's memory: every row of every tensor says the number of its expert."""

    def __init__(self, layers=2, copy=None):
        self.weights = [
            {name: np.frombuffer(memory.shared(SLOTS * n), np.uint8).reshape(SLOTS, n) for name, n in TENSORS.items()}
            for _ in range(layers)
        ]
        for layer, tensors in enumerate(self.weights):
            for slot in range(SLOTS):
                self.fill([row[slot] for row in tensors.values()], 10 * layer + slot)
        self.layout = ExpertLayout.of(self.weights, 8)
        self.staging = Staging.on_host(self.layout.kinds, 3)
        self.rows = Rows(self.layout, self.staging, copy)

    @staticmethod
    def fill(rows, expert):
        for row in rows:
            row[:] = expert

    def stage(self, layer, row, expert):
        for region in self.rows.regions(layer, row).values():
            ctypes.memset(region.address, expert, region.nbytes)

    def live(self, layer):
        """The expert in each slot; all bytes of all its tensors must be of one."""
        found = []
        for slot in range(SLOTS):
            bytes_ = {int(byte) for tensor in self.weights[layer].values() for byte in tensor[slot]}
            assert 1 == len(bytes_), f"slot {slot} is of several experts: {bytes_}"
            found.append(bytes_.pop())
        return found


@pytest.fixture
def world():
    return World()


# -- writing


def test_what_is_staged_is_written_to_its_slots_with_all_its_tensors(world):
    world.stage(1, 0, 70)
    world.stage(1, 2, 72)
    world.rows.write(1, [], [(0, 3), (2, 1), (0, 0)], None)
    assert [70, 72, 12, 70] == world.live(1)
    assert [0, 1, 2, 3] == world.live(0), "no other layer"


def test_copies_are_made_in_their_order_and_before_anything_is_written(world):
    world.stage(0, 1, 70)
    world.rows.write(0, [(0, 1), (1, 2), (2, 3)], [(1, 0)], None)
    assert [70, 0, 0, 0] == world.live(0)


def test_a_cycle_of_copies_goes_by_way_of_the_temporary_row(world):
    world.rows.write(0, [(0, -1), (1, 0), (2, 1), (-1, 2)], [], 2)
    assert [1, 2, 0, 3] == world.live(0)
    assert world.rows.live_digest(0, 2) == world.rows.staged_digest(0, 2)


def test_every_copy_is_made_by_the_function_of_the_engine():
    made = []

    def copy(target, source):
        made.append((target, source))
        copy_on_host(target, source)

    world = World(copy=copy)
    world.rows.write(0, [(3, 1)], [], None)
    live = world.rows.live(0, 1), world.rows.live(0, 3)
    assert [(live[0][name], live[1][name]) for name in TENSORS] == made
    assert [0, 3, 2, 3] == world.live(0)


def test_weights_on_an_accelerator_need_a_function_that_copies():
    layout = ExpertLayout.of([{"w": Device()}], 8)
    kind = ("w", 8, "cuda:0")
    staging = Staging({kind: Region(0x90000, 80, "cuda:0")}, 10)
    with pytest.raises(Unsupported, match="copy="):
        Rows(layout, staging)
    moved = []
    Rows(layout, staging, lambda target, source: moved.append((target, source))).write(0, [], [(2, 1)], None)
    assert [(Region(0x10008, 8, "cuda:0"), Region(0x90010, 8, "cuda:0"))] == moved


# -- where


def test_regions_are_named_by_tensor_and_lie_in_the_right_memory(world):
    live, staged = world.rows.live(1, 2), world.rows.regions(1, 2)
    assert list(TENSORS.items()) == [(name, region.nbytes) for name, region in live.items()]
    assert list(TENSORS.items()) == [(name, region.nbytes) for name, region in staged.items()]
    for name, nbytes in TENSORS.items():
        assert world.weights[1][name][2].ctypes.data == live[name].address
        assert world.staging.row((name, nbytes, "cpu"), 2).address == staged[name].address
    assert sum(TENSORS.values()) == world.rows.nbytes(0)


# -- digests


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("byte", [0, -1])
def test_every_byte_of_every_tensor_counts(world, name, byte):
    before = world.rows.live_digest(0, 1)
    others = [world.rows.live_digest(0, slot) for slot in (0, 2, 3)]
    world.weights[0][name][1][byte] ^= 1
    assert before != world.rows.live_digest(0, 1)
    assert others == [world.rows.live_digest(0, slot) for slot in (0, 2, 3)], "and of no other slot"


def test_a_digest_is_the_same_wherever_the_expert_is(world):
    world.stage(1, 2, 3)
    assert world.rows.live_digest(0, 3) == world.rows.staged_digest(1, 2)
    assert world.rows.live_digest(0, 2) != world.rows.staged_digest(1, 2)


def test_tensors_that_are_exchanged_are_another_expert(world):
    places = [(region.address, region.nbytes) for region in world.rows.live(0, 0).values()]
    ctypes.memset(places[0][0], 9, places[0][1])
    assert digest(places) != digest(places[::-1])


def test_a_digest_is_never_the_word_for_none(monkeypatch):
    class Zero:
        def update(self, data):
            pass

        def intdigest(self):
            return 0

    monkeypatch.setattr("tensorway_eplb.rows.xxhash.xxh3_64", Zero)
    assert digest([]) != UNKNOWN
