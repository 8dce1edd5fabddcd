"""The ways to rebalance that are compared, each for one rank. Every one of them commits with the same code."""

from __future__ import annotations

import ctypes
import datetime
import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import attrs
import numpy as np

from eplb_variants.model import Memory, Shape
from tensorway.eplb import ExpertLayout, Group, Staging
from tensorway.testing.ranks import Place, Rank
from tensorway_eplb.placement import Map, Placement
from tensorway_eplb.plan import LayerPlan, TransferPlan
from tensorway_eplb.policy import Topology
from tensorway_eplb.rebalancer import Rebalancer
from tensorway_eplb.rows import Rows

#: Seconds for one rebalance, and for the ranks to find each other.
DEADLINE = 60.0
#: How long the copy sleeps between two looks at its barrier.
LOOK = 20e-6
LIBC = ctypes.CDLL(None, use_errno=True)
NIXLS = ("nixl_cu12", "nixl_cu13")


@attrs.frozen
class Setup:
    """What a rank is told."""

    shape: Shape
    placements: tuple[Placement, Placement]
    weights: tuple[Memory, ...]
    staging: tuple[Memory, ...]
    #: A page of words for a barrier.
    board: Memory
    #: A file that is not there yet, where torch's ranks meet.
    store: str


class Mover(Protocol):
    """One rank of a variant."""

    def rebalance(self, to: int) -> Mapping[str, float]:
        """Go to the first placement or the second; the seconds of each phase."""
        ...


class Own:
    """This rank's weights and staging, as all variants have them."""

    def __init__(self, setup: Setup, me: int, adopt: bool = False) -> None:
        self.setup, self.me = setup, me
        self.tensors = setup.shape.weights(setup.weights[me].map(adopt))
        self.layout = ExpertLayout.of(self.tensors, setup.placements[0].num_logical)
        self.staging: Staging = setup.shape.staging(setup.staging[me].map(adopt), self.layout)
        self.rows = Rows(self.layout, self.staging)

    def plans(self) -> list[list[LayerPlan]]:
        """To the first placement and to the second. Only `Ours` makes its plans while the clock runs."""
        first, second = self.setup.placements
        topology = Topology.flat(first.ranks)
        return [
            list(TransferPlan.make(old, new, topology).rank(self.me).layers)
            for old, new in ((second, first), (first, second))
        ]

    def commit(self, plan: LayerPlan) -> None:
        """Copy what has arrived, row by row, from staging row `i` if it is arrival `i`."""
        self.rows.write(plan.layer, plan.copies, plan.writes, plan.staging_rows - 1 if plan.temporary else None)


class Ours:
    """A `Rebalancer`, as an engine holds it."""

    def __init__(self, rank: Rank, place: Place, setup: Setup, options: Mapping[str, Any]) -> None:
        own = Own(setup, place.me, adopt=options.get("shared", False))
        self._targets = setup.placements
        self._rebalancer = Rebalancer(
            rank.rendezvous(), Group(place.path, place.members, place.me), own.layout, self,
            placement=setup.placements[0], staging=own.staging, communicator="onesided",
            options={"transport": options["transport"], "transport_options": options.get("transport_options", {})},
            verify=options["verify"], patience=DEADLINE / 3, deadline=DEADLINE,
        )  # fmt: skip

    def commit(self, layer: int, experts: Map, write: Callable[[], None]) -> None:
        """See `tensorway_eplb.cycle.Engine`."""
        write()

    def rebalance(self, to: int) -> Mapping[str, float]:
        """See `Mover`."""
        began = time.monotonic()
        outcome = self._rebalancer.rebalance(self._targets[to], DEADLINE)
        assert not outcome.aborted, outcome.aborted
        phases = {name: outcome.seconds[name] for name in ("begin", "move", "commit", "end")}
        return {**phases, "plan": time.monotonic() - began - sum(phases.values())}


class Layered:
    """What the others have in common: layer by layer move, wait for all ranks, commit; the maps at the end."""

    def __init__(self, setup: Setup, me: int) -> None:
        self.own = Own(setup, me)
        self._plans = self.own.plans()
        self._maps = setup.placements[0].map.copy()

    def move(self, plan: LayerPlan, until: float) -> None:
        """Bring the rows of a layer into staging."""
        raise NotImplementedError

    def meet(self, until: float) -> None:
        """Wait for all ranks; where the sender takes part, it needs none."""

    def rebalance(self, to: int) -> Mapping[str, float]:
        """See `Mover`."""
        until = time.monotonic() + DEADLINE
        spent = {"move": 0.0, "barrier": 0.0, "commit": 0.0}
        for plan in self._plans[to]:
            began = time.monotonic()
            self.move(plan, until)
            moved = time.monotonic()
            self.meet(until)
            met = time.monotonic()
            self.own.commit(plan)
            for phase, seconds in (
                ("move", moved - began),
                ("barrier", met - moved),
                ("commit", time.monotonic() - met),
            ):
                spent[phase] += seconds
        self._maps[:] = self.own.setup.placements[to].map
        return spent


class Copy(Layered):
    """As fast as can be: memmove out of the peer's mapped weights, and a barrier that is a few words of memory."""

    #: Its part of the board: all groups have one.
    lines = slice(0, 32)

    def __init__(self, rank: Rank, place: Place, setup: Setup, options: Mapping[str, Any]) -> None:
        super().__init__(setup, place.me)
        shape = setup.shape
        self._peers = [
            [{name: rows.ctypes.data for name, rows in layer.items()} for layer in shape.weights(memory.map())]
            for memory in setup.weights
        ]
        self._board = np.frombuffer(setup.board.map(), np.int64).reshape(-1, 8)[self.lines][: len(place.members)]
        self._met = 0

    def move(self, plan: LayerPlan, until: float) -> None:
        """See `Layered`."""
        arrival = 0
        for rows in plan.fetches:
            for slot in rows.slots:
                for tensor in self.own.layout.layers[plan.layer]:
                    into = self.own.staging.row((tensor.name, tensor.row_bytes, "cpu"), arrival)
                    start = self._peers[rows.peer][plan.layer][tensor.name] + slot * tensor.row_bytes
                    self._copy(into.address, start, tensor.row_bytes)
                arrival += 1

    def meet(self, until: float) -> None:
        """See `Layered`. A word for each rank, in a cache line of its own."""
        self._met += 1
        self._board[self.own.me, 0] = self._met
        while (self._board[:, 0] < self._met).any():
            if time.monotonic() > until:
                raise TimeoutError("a rank did not come to the barrier")
            time.sleep(LOOK)

    def _copy(self, into: int, start: int, nbytes: int) -> None:
        ctypes.memmove(into, start, nbytes)


class KernelCopy(Copy):
    """The same, but the kernel copies, as it does for whoever moves bytes by CMA: no such mover can be faster."""

    lines = slice(32, 64)

    def _copy(self, into: int, start: int, nbytes: int) -> None:
        done = 0
        while done < nbytes:
            here, there = ((ctypes.c_size_t * 2)(base + done, nbytes - done) for base in (into, start))
            count = LIBC.process_vm_readv(os.getpid(), here, 1, there, 1, 0)
            if count <= 0:
                raise OSError(ctypes.get_errno(), "process_vm_readv")
            done += count


class Grouped(Layered):
    """With a group of torch's over gloo."""

    def __init__(self, rank: Rank, place: Place, setup: Setup, options: Mapping[str, Any]) -> None:
        super().__init__(setup, place.me)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of a host often has no address
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self.torch, self.dist = torch, dist
        dist.init_process_group(
            "gloo", init_method=f"file://{setup.store}", rank=place.me, world_size=len(place.members),
            timeout=datetime.timedelta(seconds=DEADLINE),
        )  # fmt: skip
        self._one = torch.zeros(1)
        self._live = [{name: torch.from_numpy(rows) for name, rows in layer.items()} for layer in self.own.tensors]
        self._staged = {
            kind: torch.from_numpy(np.asarray(region.owner).reshape(-1, kind[1]))
            for kind, region in self.own.staging.regions.items()
        }

    def move(self, plan: LayerPlan, until: float) -> None:
        """See `Layered`: one batch of sends and receives, one for each row of each tensor."""
        dist, tensors = self.dist, self.own.layout.layers[plan.layer]
        batch, arrival = [], 0
        for rows in plan.sends:
            batch += [
                dist.P2POp(dist.isend, self._live[plan.layer][tensor.name][slot], rows.peer)
                for slot in rows.slots
                for tensor in tensors
            ]
        for rows in plan.fetches:
            for _ in rows.slots:
                batch += [
                    dist.P2POp(dist.irecv, self._staged[tensor.name, tensor.row_bytes, "cpu"][arrival], rows.peer)
                    for tensor in tensors
                ]
                arrival += 1
        for work in dist.batch_isend_irecv(batch) if batch else ():
            work.wait()


class Anchor(Grouped):
    """How vLLM's NIXL communicator is described to work: a read for each expert, posted when it is named.

    Two lists of descriptors for each, prepared and released anew, sleeps of half a millisecond until all have arrived,
    an agent whose progress thread is on, as NIXL has it, and then an all-reduce over gloo that keeps who has arrived
    from writing what others read. Weights are read in place, as its later versions do; to pack them into a buffer
    first, as the first version did, would be slower. Its plans are made before the clock runs, its commit copies rows
    within a rank once, and nothing of it is verified: all that is in its favour.
    """

    def __init__(self, rank: Rank, place: Place, setup: Setup, options: Mapping[str, Any]) -> None:
        super().__init__(rank, place, setup, options)
        if options["tls"]:
            os.environ["UCX_TLS"] = options["tls"]
        os.environ["NIXL_LOG_LEVEL"] = "ERROR"
        library = importlib.import_module(next(name for name in NIXLS if importlib.util.find_spec(name)) + "._api")
        name, dist = f"{place.path}/{place.me}", self.dist
        self._agent = library.nixl_agent(name, library.nixl_agent_config())
        self._starts = [
            {tensor.name: tensor.region.address for tensor in tensors} for tensors in self.own.layout.layers
        ]
        regions = [tensor.region for tensors in self.own.layout.layers for tensor in tensors]
        regions += self.own.staging.regions.values()
        self._registered = self._agent.register_memory(
            [(region.address, region.nbytes, 0, "") for region in regions], "DRAM"
        )
        said: list[Any] = [None] * len(place.members)
        dist.all_gather_object(said, (name, self._agent.get_agent_metadata(), self._starts))
        self._peers = said
        self._lists: list[Any] = []
        for peer, (_, metadata, _) in enumerate(said):
            if peer != place.me:
                self._agent.add_remote_agent(metadata)

    def move(self, plan: LayerPlan, until: float) -> None:
        """See `Layered`."""
        handles, arrival = [], 0
        for rows in plan.fetches:
            for slot in rows.slots:
                handles.append(self._add_receive(plan.layer, rows.peer, slot, arrival))
                arrival += 1
        waiting = list(handles)
        while waiting := [handle for handle in waiting if self._under_way(handle)]:
            if time.monotonic() > until:
                raise TimeoutError("a read did not end")
            time.sleep(0.5e-3)
        for handle in handles:
            self._agent.release_xfer_handle(handle)
        for prepared in self._lists:
            self._agent.release_dlist_handle(prepared)
        self._lists.clear()

    def meet(self, until: float) -> None:
        """See `Layered`."""
        self.dist.all_reduce(self._one)

    def _add_receive(self, layer: int, peer: int, slot: int, arrival: int) -> Any:
        name, _, starts = self._peers[peer]
        here, there = [], []
        for tensor in self.own.layout.layers[layer]:
            nbytes = tensor.row_bytes
            here.append((self.own.staging.row((tensor.name, nbytes, "cpu"), arrival).address, nbytes, 0))
            there.append((starts[layer][tensor.name] + slot * nbytes, nbytes, 0))
        lists = [
            self._agent.prep_xfer_dlist(whose, self._agent.get_xfer_descs(rows, "DRAM"))
            for whose, rows in (("NIXL_INIT_AGENT", here), (name, there))
        ]
        self._lists += lists
        every = list(range(len(here)))
        handle = self._agent.make_prepped_xfer("READ", lists[0], every, lists[1], every)
        if self._agent.transfer(handle) == "ERR":
            raise RuntimeError("a read was not taken")
        return handle

    def _under_way(self, handle: Any) -> bool:
        state = self._agent.check_xfer_state(handle)
        if state == "ERR":
            raise RuntimeError("a read failed")
        return bool(state != "DONE")


KINDS: dict[str, Callable[[Rank, Place, Setup, Mapping[str, Any]], Mover]] = {
    "ours": Ours,
    "copy": Copy,
    "kernel copy": KernelCopy,
    "gloo": Grouped,
    "anchor": Anchor,
}


@attrs.frozen
class Report:
    """What one rank says about one rebalance."""

    #: When it ended, by the clock that all processes of a host share.
    ended: float
    #: Of all its threads.
    cpu: float
    phases: dict[str, float]


def enter(rank: Rank, place: Place, kind: str, setup: Setup, options: Mapping[str, Any]) -> None:
    """Find the others, and get ready."""
    rank.notes["mover"] = KINDS[kind](rank, place, setup, options)


def rebalance(rank: Rank, start: float, to: int) -> Report:
    """Begin at `start`, with all others."""
    time.sleep(max(0.0, start - time.monotonic()))
    cpu = time.process_time()
    phases = rank.notes["mover"].rebalance(to)
    return Report(time.monotonic(), time.process_time() - cpu, dict(phases))
