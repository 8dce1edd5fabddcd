"""Where the weights of experts lie in one rank: layers, tensors, rows. Checked once, so that nobody moves by mistake.

Room `eplb`; may import the rooms below. A row is what one slot of one tensor holds: all bytes of one expert in it. The
slots of all tensors of a layer go together: slot 3 of the weights and slot 3 of their scales are one expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from tensorway.errors import LayoutInvalid
from tensorway.memory import Region
from tensorway.rendezvous.negotiation import Fact
from tensorway.transport.blocks import BlockTable

#: More than any model has; beyond that a number is a mistake.
_MAX_LAYERS: Final = 4096
_MAX_SLOTS: Final = 1 << 16


@attrs.frozen
class ExpertTensor:
    """One tensor of experts: slot `i` has `row_bytes` bytes, `stride` apart, from the region's first byte on."""

    name: str
    #: What the engine calls its type: `float8_e4m3fn`. Never interpreted; ranks must say the same.
    dtype: str
    row_bytes: int
    stride: int
    region: Region = attrs.field(repr=False)

    @property
    def kind(self) -> tuple[str, int, str]:
        """What its rows have in common with those of other layers: name, row length and device."""
        return self.name, self.row_bytes, self.region.device

    @classmethod
    def of(cls, name: str, tensor: Any, slots: int) -> ExpertTensor:
        """The rows of a tensor or array whose first dimension is slots; raises `LayoutInvalid` for any other."""
        shape, strides, itemsize = tuple(tensor.shape), _strides(tensor), _itemsize(tensor)
        asked = f"Tensor {name} of shape {shape} was given as the weights of {slots} slots."
        if not shape or shape[0] != slots or slots < 1:
            raise LayoutInvalid(asked, "Its first dimension is not the slots.", "Give one row for each local slot.")
        if any(step == 0 and length > 1 for step, length in zip(strides, shape, strict=True)):
            true = "It is broadcast (a stride is 0): several slots are one memory, and writing one would write all."
            raise LayoutInvalid(asked, true, "Give the tensor that owns the memory, or a contiguous copy.")
        row, expected = itemsize, []
        for length in reversed(shape[1:]):
            expected.append(row)
            row *= length
        if any(
            step != wanted and length > 1
            for step, wanted, length in zip(strides[1:], reversed(expected), shape[1:], strict=True)
        ):
            raise LayoutInvalid(asked, "Its rows are not contiguous.", "Make it contiguous before it is registered.")
        stride = strides[0] if slots > 1 else row
        if row == 0 or stride < row:
            raise LayoutInvalid(asked, "Its rows are empty, or overlap.", "Give the tensor that owns the memory.")
        return cls(name, str(tensor.dtype), row, stride, _region(tensor, stride * (slots - 1) + row, asked))


@attrs.frozen
class ExpertLayout:
    """All expert weights of one rank. Every layer has the same slots; layers may differ in their tensors."""

    layers: tuple[tuple[ExpertTensor, ...], ...]
    slots: int
    num_logical: int

    def __attrs_post_init__(self) -> None:
        asked = f"A layout of {len(self.layers)} layers, {self.slots} slots and {self.num_logical} experts was given."
        if not 0 < len(self.layers) <= _MAX_LAYERS or not 0 < self.slots <= _MAX_SLOTS or self.num_logical < 1:
            raise LayoutInvalid(asked, "One of these numbers is out of range.", "Give the numbers of the model.")
        for index, tensors in enumerate(self.layers):
            names = [tensor.name for tensor in tensors]
            if not names or len(set(names)) != len(names):
                raise LayoutInvalid(
                    asked, f"Layer {index} has the tensors {names}.", "Give each a name of its own, and at least one."
                )
            for tensor in tensors:
                if tensor.stride * (self.slots - 1) + tensor.row_bytes > tensor.region.nbytes:
                    true = f"Tensor {tensor.name} of layer {index} ends before its last slot does."
                    raise LayoutInvalid(asked, true, "Give all of its memory.")

    @classmethod
    def of(cls, layers: Iterable[Mapping[str, Any]], num_logical: int) -> ExpertLayout:
        """From the engine's tensors: for each layer, name and tensor of everything that belongs to an expert."""
        named = [dict(layer) for layer in layers]
        first = next((tensor for layer in named for tensor in layer.values()), None)
        slots = int(first.shape[0]) if first is not None and len(first.shape) else 0
        rows = tuple(tuple(ExpertTensor.of(name, layer[name], slots) for name in sorted(layer)) for layer in named)
        return cls(rows, slots, num_logical)

    @property
    def kinds(self) -> tuple[tuple[str, int, str], ...]:
        """Name, row length and kind of device of every different kind of row; a staging buffer is made for each."""
        return tuple(sorted({tensor.kind for layer in self.layers for tensor in layer}))

    @property
    def host_visible(self) -> bool:
        """Whether every row can be read by the processor."""
        return all(tensor.region.device == "cpu" for layer in self.layers for tensor in layer)

    def row_bytes(self, layer: int) -> int:
        """The bytes of one expert in one layer."""
        return sum(tensor.row_bytes for tensor in self.layers[layer])

    def facts(self) -> dict[str, Fact]:
        """What every member of a group must say alike: by `negotiation`, so that differences name the tensor."""
        facts = {"experts": Fact(self.num_logical), "slots": Fact(self.slots), "layers": Fact(len(self.layers))}
        for index, tensors in enumerate(self.layers):
            for tensor in tensors:
                facts[f"layer {index} {tensor.name}"] = Fact(f"{tensor.dtype}, {tensor.row_bytes} bytes a row")
        return facts

    def tables(self) -> dict[tuple[str, int, str], BlockTable]:
        """For each kind of row one stacked table of all layers that have it; `planes` says which these are.

        The row of slot `s` in the `n`-th of them is `n * slots + s`.
        """
        made = {}
        for kind in self.kinds:
            tensors = [self.tensor(layer, kind) for layer in self.planes(kind)]
            if len({tensor.stride for tensor in tensors}) > 1:
                raise LayoutInvalid(
                    f"Tensor {kind[0]} was to be moved.",
                    f"Its rows of {kind[1]} bytes are {sorted({tensor.stride for tensor in tensors})} bytes apart.",
                    "Allocate it alike in all layers.",
                )
            bases = tuple(tensor.region.address for tensor in tensors)
            made[kind] = BlockTable(bases, kind[1], tensors[0].stride, self.slots, kind[2], stacked=True)
        return made

    def planes(self, kind: tuple[str, int, str]) -> list[int]:
        """The layers that have rows of this kind."""
        return [index for index, layer in enumerate(self.layers) if any(tensor.kind == kind for tensor in layer)]

    def tensor(self, layer: int, kind: tuple[str, int, str]) -> ExpertTensor:
        """The tensor of this kind in this layer."""
        return next(tensor for tensor in self.layers[layer] if tensor.kind == kind)


def _strides(tensor: Any) -> tuple[int, ...]:
    """In bytes: torch counts elements in a method, numpy bytes in an attribute."""
    strides = tensor.stride() if callable(getattr(tensor, "stride", None)) else None
    if strides is not None:
        return tuple(int(step) * _itemsize(tensor) for step in strides)
    return tuple(int(step) for step in tensor.strides)


def _itemsize(tensor: Any) -> int:
    element = getattr(tensor, "element_size", None)
    return int(element() if callable(element) else tensor.itemsize)


def _region(tensor: Any, nbytes: int, asked: str) -> Region:
    """The rows' memory, also if there are gaps between rows, which a region of a whole tensor does not take."""
    device = getattr(tensor, "device", "cpu")
    kind, index = str(getattr(device, "type", device)), getattr(device, "index", None)
    if callable(getattr(tensor, "data_ptr", None)):
        address = int(tensor.data_ptr())
    elif hasattr(tensor, "__array_interface__"):
        address, read_only = tensor.__array_interface__["data"]
        if read_only:
            raise LayoutInvalid(asked, "It is read-only.", "Give the memory that the engine computes with.")
    else:
        address = 0
    if address <= 0:  # as of a tensor on the device `meta`
        raise LayoutInvalid(asked, "It does not say where it is.", "Give a torch tensor or a numpy array with memory.")
    return Region(address, nbytes, kind if kind == "cpu" or index is None else f"{kind}:{index}", owner=tensor)
