"""What travels for the rows of one fetch: large rows one by one, where they lie, and small ones packed together.

Imported by `session` only; imports torch. Both ends work out the same messages from the lengths of rows and their
number alone, since the receiver does not see what lies side by side at the sender, nor the other way round.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Final

import attrs
import torch

from tensorway.errors import MemoryInvalid
from tensorway.memory import Region

#: Rows shorter than this are packed: on loopback, rows of 16 KiB arrive three times as fast so, of 256 KiB no faster.
PACKED_BELOW: Final = 128 << 10
#: A packed message is no longer than this, so that one can be copied while the next one travels.
PACK: Final = 1 << 20

#: A tensor's place among those of the layer, and a slot's among those of the fetch.
Place = tuple[int, int]


@attrs.frozen(eq=False)
class Message:
    """One send, and one receive."""

    #: What gloo sends or fills; the row itself unless there are `rows`.
    tensor: torch.Tensor
    #: Rows that lie in `tensor` one after another, and elsewhere by themselves.
    rows: tuple[torch.Tensor, ...] = ()

    @property
    def direct(self) -> bool:
        """Whether gloo touches the memory of the row."""
        return not self.rows

    def pack(self) -> None:
        """Copy from the rows; where these are on an accelerator, it has been done on return."""
        for part, row in self._parts():
            part.copy_(row)

    def unpack(self) -> None:
        """Copy to the rows, likewise."""
        for part, row in self._parts():
            row.copy_(part)

    def _parts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        parts, offset = [], 0
        for row in self.rows:
            parts.append((self.tensor[offset : offset + row.numel()], row))
            offset += row.numel()
        return parts


def messages(sizes: Sequence[int], count: int, row: Callable[[int, int], torch.Tensor]) -> list[Message]:
    """The messages for so many slots of tensors whose rows have these sizes; `row` is asked for each place."""
    return [_message([row(*place) for place in group]) for group in grouped(tuple(sizes), count)]


def _message(rows: list[torch.Tensor]) -> Message:
    on_host = rows[0].device.type == "cpu"
    if len(rows) == 1 and on_host:
        return Message(rows[0])
    # Copies between the device and memory that is not pinned go by way of memory that is, once more.
    pinned = any(row.device.type != "cpu" for row in rows)
    size = sum(row.numel() for row in rows)
    return Message(torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned), tuple(rows))


@functools.lru_cache(maxsize=256)
def grouped(sizes: tuple[int, ...], count: int) -> tuple[tuple[Place, ...], ...]:
    """Which rows share a message. Slot by slot, and within a slot by tensor."""
    groups: list[tuple[Place, ...]] = []
    packed: list[Place] = []
    room = PACK
    for position in range(count):
        for tensor, size in enumerate(sizes):
            if size >= PACKED_BELOW:
                groups.append(((tensor, position),))
                continue
            if size > room:
                groups.append(tuple(packed))
                packed, room = [], PACK
            packed.append((tensor, position))
            room -= size
    return (*groups, tuple(packed)) if packed else tuple(groups)


def bounced(sizes: Sequence[int], *, on_host: bool) -> int:
    """How many bytes of one slot travel by way of a buffer of ours."""
    return sum(size for size in sizes if size < PACKED_BELOW or not on_host)


def bytes_of(region: Region) -> torch.Tensor:
    """A region as a tensor of bytes: the same memory. The caller keeps the region."""
    if region.device == "cpu":
        return torch.frombuffer((ctypes.c_char * region.nbytes).from_address(region.address), dtype=torch.uint8)
    owner = region.owner
    if not isinstance(owner, torch.Tensor):
        raise MemoryInvalid(
            f"Rows on {region.device} were to be moved over gloo.",
            f"Their region belongs to a {type(owner).__name__}, and torch copies from its own tensors only.",
            "Make the layout and the staging of torch tensors: ExpertLayout.of, Region.of.",
        )
    storage = owner.untyped_storage()
    start = region.address - storage.data_ptr()
    whole = torch.empty(0, dtype=torch.uint8, device=owner.device).set_(storage)
    return whole[start : start + region.nbytes]
