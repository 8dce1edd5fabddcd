"""`TensorwayEplbCommunicator`: vLLM's contract of a communicator, over any `eplb_communicator` of Tensorway.

May import vllm, torch, the core and `tensorway-eplb`. vLLM adds what a layer sends and receives, row by row, and calls
`execute` on all ranks; the rows of a layer come into staging memory of ours, and from there into vLLM's buffer. What
fails here fails on all ranks that are still in that layer, by its deadline, before vLLM touches a weight of it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from vllm.distributed.eplb.eplb_communicator import EplbCommunicator

import tensorway
from tensorway._logging import logger
from tensorway.eplb import EplbContext, ExpertLayout, Session, Staging
from tensorway.errors import LayoutInvalid
from tensorway.memory import Region
from tensorway_vllm.eplb.meeting import MEASURED, Meeting, Met
from tensorway_vllm.eplb.options import EplbOptions

if TYPE_CHECKING:
    from tensorway_eplb.communicator import Communicator

_log = logger("vllm")
_ASKED: Final = "Weights of experts were to be moved by Tensorway in vLLM."


class TensorwayEplbCommunicator(EplbCommunicator):
    """See `vllm.distributed.eplb.eplb_communicator`. One thread at a time uses it, as with vLLM's own."""

    def __init__(
        self,
        options: EplbOptions,
        coordinator: Any,
        expert_weights: Sequence[Sequence[torch.Tensor]],
        expert_buffer: Sequence[torch.Tensor],
    ) -> None:
        """All ranks of the group call it. It returns when all are connected, and raises on all if one is not."""
        self._stream: torch.Stream | None = None
        self._seconds = options.layer_seconds
        self._device = expert_weights[0][0].device if expert_weights and expert_weights[0] else torch.device("cpu")
        meeting = Meeting(coordinator, options, self._device.type)
        met = meeting.meet()
        try:
            opened = meeting.settle(lambda: _opened(options, met, meeting.left, expert_weights, expert_buffer))
        except BaseException:
            met.rendezvous.close()
            raise
        self._face, self.backend = opened
        # vLLM drops a communicator and says nothing: when a group changes its size, and when an engine ends.
        self._end = weakref.finalize(self, _end, self._face, met)
        _log.info("EPLB communicator %s, %d ranks, met at %s", self.backend, coordinator.world_size, met.group.path)

    def add_send(self, tensors: list[torch.Tensor], dst_rank: int, expert_id: int) -> None:
        """Let a rank have an expert of this one."""
        self._face.add_send(tensors, dst_rank, expert_id)

    def add_recv(self, tensors: list[torch.Tensor], src_rank: int, expert_id: int) -> None:
        """Bring an expert of another rank into these rows of vLLM's buffer."""
        self._face.add_recv(tensors, src_rank, expert_id)

    def execute(self) -> None:
        """Move what was added; see `tensorway.eplb.contract.EplbCommunicator`."""
        with _on(self._stream, self._device) as computed:
            computed()  # who reads from here does not see the stream; nor does who writes to the buffer
            self._face.execute(self._seconds)
            computed()

    def set_transfer_context(self, old_indices: Any, layer_idx: int) -> None:
        """Which expert each slot of the group holds in a layer, before it moves."""
        self._face.set_transfer_context(old_indices, layer_idx)

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """All memory has been taken when it was made."""
        return False

    def set_stream(self, stream: torch.Stream | None) -> None:
        """The stream on which vLLM fills its buffer; waited for before and after each layer."""
        self._stream = stream

    def close(self) -> None:
        """Leave; the second call does nothing. vLLM does not call it: it happens when this is collected."""
        self._end()


def layout_of(expert_weights: Sequence[Sequence[torch.Tensor]], ranks: int) -> ExpertLayout:
    """vLLM's weights: for each layer its tensors, whose first dimension are the slots of this rank."""
    if not expert_weights or not expert_weights[0]:
        raise LayoutInvalid(_ASKED, "vLLM gave no weights.", "Balance a model with experts.")
    # In vLLM's order: names are sorted, and rows are given in the order of the names.
    named = [{f"{index:03}": tensor.detach() for index, tensor in enumerate(layer)} for layer in expert_weights]
    slots = int(expert_weights[0][0].shape[0])
    return ExpertLayout.of(named, num_logical=slots * ranks)


def copy_rows(target: Region, source: Region) -> None:
    """One row into another, on whichever device they are; both belong to tensors."""
    _bytes(target).copy_(_bytes(source), non_blocking=True)


def _opened(
    options: EplbOptions, met: Met, seconds: float,
    expert_weights: Sequence[Sequence[torch.Tensor]], expert_buffer: Sequence[torch.Tensor],
) -> tuple[Communicator, str]:  # fmt: skip
    """A session and the face over it, and what moves the rows."""
    from tensorway_eplb.choice import fastest, installed
    from tensorway_eplb.communicator import Communicator
    from tensorway_eplb.control import StoreControl

    layout = layout_of(expert_weights, len(met.group.members))
    staging = _staging(layout)
    name, given = met.communicator, dict(options.options)
    if name == MEASURED:
        choice = fastest(met.rendezvous, met.group, layout, staging, seconds / 2, installed(given))
        name, given = choice.name, dict(choice.options)
    context = EplbContext(met.group, layout, staging, met.rendezvous, seconds)
    session: Session = tensorway.create("eplb_communicator", name, given, context)
    try:
        session.warmup(seconds)  # what the first move would take is taken before vLLM measures what is left
        control = session.control or StoreControl(met.rendezvous, met.group)
        copy = None if layout.host_visible else copy_rows
        return Communicator(session, control, met.group, layout, staging, copy=copy), name
    except BaseException:
        session.close()
        raise


def _staging(layout: ExpertLayout) -> Staging:
    """Room for one layer, where the weights are: no rank receives more than it has slots."""
    if layout.host_visible:
        return Staging.on_host(layout.kinds, layout.slots)
    memory = {kind: torch.empty(layout.slots * kind[1], dtype=torch.uint8, device=kind[2]) for kind in layout.kinds}
    return Staging({kind: Region.of(tensor) for kind, tensor in memory.items()}, layout.slots)


def _bytes(region: Region) -> torch.Tensor:
    owner: Any = region.owner
    first = region.address - owner.data_ptr()
    found: torch.Tensor = owner.detach().reshape(-1).view(torch.uint8)[first : first + region.nbytes]
    return found


@contextlib.contextmanager
def _on(stream: torch.Stream | None, device: torch.device) -> Iterator[Any]:
    """Work on a stream, and what waits for all that was given to it; nothing where the processor computes."""
    if device.type == "cpu":
        yield lambda: None
        return
    before = torch.accelerator.current_stream()
    used = stream if stream is not None else before
    torch.accelerator.set_stream(used)
    try:
        yield used.synchronize
    finally:
        torch.accelerator.set_stream(before)


def _end(face: Communicator, met: Met) -> None:
    face.close()
    met.rendezvous.close()
