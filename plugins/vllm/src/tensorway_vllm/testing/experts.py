"""Ranks that balance experts with vLLM's own code, on processors: what tests let processes of `testing.ranks` call.

May import torch and all of this package, and vllm in the ranks. What is real: vLLM's groups of processes (gloo), its
plugins, its config, `EplbState` with all that it calls, its policy, its planning and its mover.

What is not, for vLLM refuses expert balancing where there is no accelerator: that check is passed by (`enable_eplb` is
set on a config that is made already), the model is a stand-in that has weights and computes nothing, and what vLLM asks
of an accelerator's streams and events is answered by stand-ins, for a processor has done what it was told when it
returns. vLLM's own communicator beside ours is the one that it takes for weights in host memory: `torch_nccl`, on its
group of processors.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Final

import attrs
import torch

from tensorway.testing.ranks import Place, Rank

LAYERS: Final = 3
ROUTED: Final = 10
#: Three kinds of rows, of which none is a multiple of another.
_TENSORS: Final = (((16, 9), torch.bfloat16), ((40,), torch.uint8), ((3,), torch.float32))


@attrs.frozen
class Told:
    """What came of one call at one rank."""

    seconds: float
    #: The error's class, whether it is one of Tensorway's, and its text; empty if there was none.
    error: str
    text: str
    #: What vLLM believes: the expert in each slot of the group, by layer.
    maps: list[list[int]]
    #: What is there: the expert in each slot of this rank, by layer; -2 for bytes that are no expert's.
    held: list[list[int]]
    #: Of all bytes of this rank's weights.
    digest: str


class Experts:
    """What vLLM asks of a model with experts, and the weights; see `MixtureOfExperts`."""

    def __init__(self, ranks: int, me: int, slots: int, layers: int = LAYERS, wide: int = 1) -> None:
        self.num_moe_layers, self.num_expert_groups = layers, 1
        self.num_routed_experts = self.num_logical_experts = ROUTED
        self.num_physical_experts, self.num_local_physical_experts = ranks * slots, slots
        self.num_redundant_experts = ranks * slots - ROUTED
        self.moe_layers: list[Any] = []
        self.expert_weights = [
            [torch.zeros((slots, wide, *shape), dtype=kind) for shape, kind in _TENSORS] for _ in range(layers)
        ]
        self._wide = wide
        self._first = me * slots

    def set_eplb_state(self, *_: Any) -> None:
        """Nothing is computed, so nothing is counted."""

    def fill(self, maps: torch.Tensor) -> None:
        """Hold what a map says; an empty slot holds zeros."""
        for layer, row in enumerate(maps.tolist()):
            for slot in range(self.num_local_physical_experts):
                for index, tensor in enumerate(self.expert_weights[layer]):
                    expert = row[self._first + slot]
                    _bytes(tensor[slot]).copy_(
                        row_of(layer, expert, index, self._wide) if expert >= 0 else torch.tensor(0)
                    )

    def held(self) -> list[list[int]]:
        """Which expert's bytes are in each slot, all tensors of it."""
        slots = range(self.num_local_physical_experts)
        return [[self._expert_in(layer, slot) for slot in slots] for layer in range(self.num_moe_layers)]

    def _expert_in(self, layer: int, slot: int) -> int:
        rows = [_bytes(tensor[slot]) for tensor in self.expert_weights[layer]]
        for expert in range(ROUTED):
            if all(torch.equal(row, row_of(layer, expert, index, self._wide)) for index, row in enumerate(rows)):
                return expert
        return -1 if not any(row.any() for row in rows) else -2

    def digest(self) -> str:
        """Of all weights."""
        found = hashlib.blake2b(digest_size=16)
        for tensors in self.expert_weights:
            for tensor in tensors:
                found.update(_bytes(tensor).numpy().tobytes())
        return found.hexdigest()


def row_of(layer: int, expert: int, index: int, wide: int = 1) -> torch.Tensor:
    """The bytes of an expert in one tensor of a layer, so many times."""
    shape, kind = _TENSORS[index]
    length = torch.Size(shape).numel() * kind.itemsize
    made = torch.Generator().manual_seed(1 + (layer * ROUTED + expert) * len(_TENSORS) + index)
    return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=made).repeat(wide)


def enter(rank: Rank, place: Place, folder: str) -> None:
    """Once in a process: vLLM's plugins, then its groups; each group of processes has a folder of its own."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for name in ("Event", "Stream"):
        setattr(torch, name, _Done)
    for name, instead in (("Event", _Done), ("Stream", _Done), ("stream", contextlib.nullcontext)):
        setattr(torch.cuda, name, instead)  # vLLM 0.30 asks these
    for name in ("set_device_index", "set_stream", "current_stream", "current_accelerator"):
        setattr(torch.accelerator, name, lambda *_: None)
    config = _config({}, len(place.members))
    with set_current_vllm_config(config):
        size, me, method = len(place.members), place.me, f"file://{folder}/ranks"
        init_distributed_environment(size, me, method, me, "gloo")
        initialize_model_parallel(size)
    rank.notes["place"] = place


def make(rank: Rank, name: str, additional: dict[str, Any], slots: int = 5, layers: int = LAYERS, wide: int = 1) -> str:
    """A state of vLLM's with a model, as its workers make it; returns the communicator's class, or what was raised."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.eplb.eplb_state import EplbState

    place: Place = rank.notes["place"]
    config = _config(additional, len(place.members))
    with set_current_vllm_config(config):
        try:
            state = EplbState(config.parallel_config, torch.device("cpu"))
            model = Experts(len(place.members), place.me, slots, layers, wide)
            state.add_model(model, SimpleNamespace(compute_hash=lambda: "one", model=name))
        except Exception as error:  # the test says which it expects
            return f"{type(error).__name__}: {error}"
    (held,) = state.model_states.values()
    model.fill(held.physical_to_logical_map)
    rank.notes[name] = SimpleNamespace(state=state, held=held, model=model, config=config)
    return type(held.communicator).__name__


def rearrange(rank: Rank, name: str, seed: int, end: tuple[int, int] | None = None) -> Told:
    """One rearrangement of vLLM's, for loads of this seed. `end`: at which layer this rank gets a signal; 0 fails."""
    found = rank.notes[name]
    loads = torch.randint(0, 1000, found.held.expert_load_window.shape, generator=torch.Generator().manual_seed(seed))
    found.held.expert_load_window.copy_(loads)
    if end is not None:
        _end_at(found.held.communicator, *end)
    return _told(found, found.state.rearrange)


def beside(rank: Rank, name: str, seed: int, end: tuple[int, int] | None, seconds: float) -> Told:
    """The same in vLLM's thread, and steps of an engine meanwhile: for so long, or until all layers have moved."""
    found = rank.notes[name]
    state, held = found.state, found.held
    state.is_async = True
    state.device_index = state.cuda_device_index = 0  # in 0.30 it has the other name
    state.start_async_loop()
    told = rearrange(rank, name, seed, end)
    until = time.monotonic() + seconds
    # All ranks take as many steps: a step has a collective call while layers move.
    while told.error == "" and held.rebalanced and not _any_over(until):
        told = _told(found, state.step)
    return told


def _any_over(until: float) -> bool:
    """Whether the time of any rank is over, the same on all."""
    from vllm.distributed.parallel_state import get_ep_group

    over = torch.tensor([int(time.monotonic() >= until)])
    torch.distributed.all_reduce(over, group=get_ep_group().cpu_group)
    return bool(over.item())


def move(rank: Rank, name: str, old: Sequence[Sequence[int]], new: Sequence[Sequence[int]]) -> Told:
    """From one map to another by vLLM's mover, whatever is empty in them; maps stay as they are."""
    from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace
    from vllm.distributed.parallel_state import get_eplb_group

    found = rank.notes[name]
    before, after = torch.tensor(old), torch.tensor(new)
    found.model.fill(before)
    return _told(
        found,
        lambda: rearrange_expert_weights_inplace(
            before,
            after,
            found.model.expert_weights,
            found.held.expert_buffer,
            get_eplb_group().device_group,
            found.held.communicator,
        ),
    )


def again(rank: Rank, name: str, layer: int) -> Told:
    """Whatever a communicator says when it is asked for one more layer, in which this rank has nothing to do."""
    found = rank.notes[name]
    communicator = found.held.communicator
    communicator.set_transfer_context(found.held.physical_to_logical_map[layer].numpy(), layer)
    return _told(found, communicator.execute)


def policy_of(rank: Rank, name: str) -> str:
    """The class of the policy that a state has."""
    policy = rank.notes[name].state.policy
    return policy.__name__ if isinstance(policy, type) else type(policy).__name__


def drop(rank: Rank, name: str) -> int:
    """Let go of a state as vLLM does, without a word; how many threads are left."""
    import gc

    rank.notes.pop(name)
    gc.collect()
    return threading.active_count()


def _told(found: Any, act: Any) -> Told:
    began, error, text = time.monotonic(), "", ""
    try:
        act()
    except Exception as raised:
        error, text = type(raised).__name__, str(raised)
    seconds = time.monotonic() - began
    maps = found.held.physical_to_logical_map.tolist()
    return Told(seconds, error, text, maps, found.model.held(), found.model.digest())


def _end_at(communicator: Any, layer: int, number: int) -> None:
    """In the middle of a move: when this rank has said what it sends and receives in that layer."""
    execute, calls = communicator.execute, iter(range(layer))

    def executed() -> None:
        if next(calls, None) is None:
            if not number:
                raise OSError("this rank was made to fail")
            os.kill(os.getpid(), signal.Signals(number))
        execute()

    communicator.execute = executed


def _config(additional: dict[str, Any], ranks: int) -> Any:
    from vllm.config import EPLBConfig, VllmConfig

    config = VllmConfig(additional_config=additional)
    parallel = config.parallel_config
    parallel.eplb_config = EPLBConfig(
        use_async=False, communicator="torch_nccl", window_size=4, step_interval=1_000_000
    )
    parallel.tensor_parallel_size, parallel.world_size = ranks, ranks
    parallel.enable_expert_parallel = parallel.enable_eplb = True
    return config


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


class _Done:
    """What an event or a stream is to a processor, which has done what it was told; an event has its time."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at = 0.0

    def record(self, *_: Any) -> None:
        """Now."""
        self._at = time.monotonic()

    def wait(self, *_: Any) -> None:
        """There is nothing to wait for."""

    def synchronize(self) -> None:
        """The same."""

    def elapsed_time(self, later: _Done) -> float:
        """Milliseconds."""
        return 1e3 * (later._at - self._at)
