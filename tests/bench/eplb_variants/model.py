"""What is moved: the same weights for all variants, in memory that every process maps; and between which placements."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from tensorway import memory
from tensorway.eplb import ExpertLayout, Staging
from tensorway.memory import Region
from tensorway_eplb.placement import Placement

#: Of the half of all slots that change, so many of eight come from other ranks, and the others from the same.
REMOTE_OF_8 = 6


@attrs.frozen
class Shape:
    """Of one rank's weights."""

    layers: int
    slots: int
    #: Name and row length of the tensors of every layer.
    tensors: tuple[tuple[str, int], ...]

    @property
    def row_bytes(self) -> int:
        """One expert in one layer."""
        return sum(nbytes for _, nbytes in self.tensors)

    @property
    def weights_bytes(self) -> int:
        """All weights of a rank."""
        return self.layers * self.slots * self.row_bytes

    @property
    def staging_rows(self) -> int:
        """Two layers of slots, as a rebalancer takes by itself."""
        return 2 * self.slots

    @property
    def staging_bytes(self) -> int:
        """For one rank."""
        return self.staging_rows * self.row_bytes

    def weights(self, buffer: Any) -> list[dict[str, NDArray[np.uint8]]]:
        """For each layer its tensors, [slots, row], in memory of `weights_bytes`."""
        found, at = [], 0
        for _ in range(self.layers):
            layer = {}
            for name, nbytes in self.tensors:
                rows = np.frombuffer(buffer, np.uint8, self.slots * nbytes, at)
                layer[name] = rows.reshape(self.slots, nbytes)
                at += rows.nbytes
            found.append(layer)
        return found

    def staging(self, buffer: Any, layout: ExpertLayout) -> Staging:
        """Over memory of `staging_bytes`."""
        regions, at = {}, 0
        for kind in layout.kinds:
            nbytes = self.staging_rows * kind[1]
            regions[kind] = Region.of(np.frombuffer(buffer, np.uint8, nbytes, at))
            at += nbytes
        return Staging(regions, self.staging_rows)


FULL = Shape(8, 16, (("w13", 4 << 20), ("w2", 2 << 20), ("w13_scale", 1024), ("w2_scale", 512)))
SHORT = Shape(4, 16, (("w13", 2 << 20), ("w2", 1 << 20), ("w13_scale", 1024), ("w2_scale", 512)))


def placements(shape: Shape, ranks: int) -> tuple[Placement, Placement]:
    """Two between which half of all slots change: three quarters of those have their expert from another rank."""
    rng, slots = np.random.default_rng(36276), shape.slots
    old = np.stack([rng.permutation(slots * ranks) for _ in range(shape.layers)]).astype(np.int32)
    new = old.copy()
    for layer in range(shape.layers):
        chosen = np.stack([rng.permutation(slots)[: slots // 2] + rank * slots for rank in range(ranks)])
        for index in range(slots // 2):
            if index % 8 < REMOTE_OF_8:  # to the next rank, or the one behind it, in turns
                new[layer, np.roll(chosen[:, index], -1 - index % (ranks - 1))] = old[layer, chosen[:, index]]
            else:  # to the next of those within the rank, in a ring
                within = [each for each in range(slots // 2) if each % 8 >= REMOTE_OF_8]
                to = within[(within.index(index) + 1) % len(within)]
                new[layer, chosen[:, to]] = old[layer, chosen[:, index]]
    return tuple(Placement(each, slots * ranks, ranks) for each in (old, new))  # type: ignore[return-value]


def received_bytes(shape: Shape, ranks: int) -> int:
    """What each rank receives from others, there and back."""
    there, back = placements(shape, ranks)
    rows = sum(len(set(back.by_rank[layer, 0]) ^ set(there.by_rank[layer, 0])) for layer in range(shape.layers))
    return rows * shape.row_bytes


class Contents:
    """What each expert is: no two have any word of the same tensor alike, so that a wrong row shows anywhere."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        rng = np.random.default_rng(1)
        self._base = {name: rng.integers(0, 1 << 62, nbytes // 8, dtype=np.uint64) for name, nbytes in shape.tensors}

    def fill(self, buffers: Sequence[Any], placement: Placement) -> None:
        """Make the weights of all ranks what a placement says."""
        for rank, buffer in enumerate(buffers):
            for layer, tensors in enumerate(self.shape.weights(buffer)):
                for name, rows in tensors.items():
                    for slot, expert in enumerate(placement.by_rank[layer, rank].tolist()):
                        rows[slot].view(np.uint64)[:] = self._base[name] + np.uint64(self._tag(layer, expert))

    def wrong(self, buffers: Sequence[Any], placement: Placement, every_byte: bool) -> list[str]:
        """Rows that are not what a placement says: by every byte, or by words from all over them."""
        found = []
        for rank, buffer in enumerate(buffers):
            for layer, tensors in enumerate(self.shape.weights(buffer)):
                for name, rows in tensors.items():
                    base = self._base[name]
                    some = slice(None) if every_byte else np.linspace(0, len(base) - 1, 64).astype(int)
                    for slot, expert in enumerate(placement.by_rank[layer, rank].tolist()):
                        wanted = base[some] + np.uint64(self._tag(layer, expert))
                        if (rows[slot].view(np.uint64)[some] != wanted).any():
                            found.append(f"rank {rank} layer {layer} slot {slot} {name}")
        return found

    def _tag(self, layer: int, expert: int) -> int:
        return layer << 20 | expert


@attrs.frozen
class Memory:
    """Memory of `tensorway.memory.shared` of another process, and how to find it there."""

    pid: int
    file: int
    nbytes: int

    @classmethod
    def of(cls, buffer: memoryview) -> Memory:
        """Of this process."""
        found = memory.SharedFile.of(Region.of(buffer))
        assert found is not None, "it was made by memory.shared"
        return cls(os.getpid(), found[0].number, buffer.nbytes)

    def map(self, adopt: bool = False) -> memoryview:
        """Map it here, for ever. `adopt`: as if it had been made here by `shared`, so that peers can map it, too."""
        file = os.open(f"/proc/{self.pid}/fd/{self.file}", os.O_RDWR | os.O_CLOEXEC)
        whole = os.fstat(file).st_size
        address = memory.map_file(whole, file)
        buffer = (ctypes.c_char * self.nbytes).from_address(address)
        if adopt:
            # An engine makes its weights with `shared` itself. Here they are one for all processes of a rank, which
            # no engine needs, so there is no public way to say it.
            status = os.fstat(file)
            memory._files[address] = memory.SharedFile(
                address, whole, file, status.st_dev, status.st_ino, weakref.ref(buffer)
            )
        return memoryview(buffer).cast("B")
