"""What an engine holds: one rank's part in rebalancing, from joining to leaving. Start reading here.

May import the core and its own dist. All ranks of a group call the same methods in the same order; each call has a
deadline, ends by it, and says who is missing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np

import tensorway
from tensorway.eplb import Control, EplbContext, ExpertLayout, Group, Session, Staging
from tensorway.errors import BackendUnavailable, Closed, Excluded, PeerLost, PlacementInvalid
from tensorway.exports import export
from tensorway.memory import Region
from tensorway.metrics import Counters, Sample
from tensorway.rendezvous import Rendezvous
from tensorway_eplb.arrivals import CopySource
from tensorway_eplb.choice import AUTO, MEASURED, Choice, decided, fastest, fastest_if_apart, installed
from tensorway_eplb.control import StoreControl
from tensorway_eplb.cycle import Cause, Cycle, Engine, Outcome, Pending, Terms, settle_event
from tensorway_eplb.membership import Membership, Truth
from tensorway_eplb.placement import EMPTY, Map, Placement
from tensorway_eplb.plan import TransferPlan
from tensorway_eplb.policy import Topology
from tensorway_eplb.rows import UNKNOWN, Copy, Digests, Rows
from tensorway_eplb.vocabulary import METRICS, samples

#: Experts that an error names.
_NAMED: Final = 5
#: The part of the time to join that measuring communicators may take.
_MEASURING: Final = 0.6


class Rebalancer:
    """One rank of a group that moves experts. One thread at a time uses it."""

    _placement: Placement
    _control: Control

    def __init__(
        self,
        rendezvous: Rendezvous,
        group: Group,
        layout: ExpertLayout,
        engine: Engine,
        *,
        placement: Placement | None = None,
        staging: Staging | int | None = None,
        communicator: str = "auto",
        options: Mapping[str, object] | None = None,
        topology: Topology | None = None,
        source: CopySource | None = None,
        copy: Copy | None = None,
        verify: bool | None = None,
        patience: float = 2.0,
        deadline: float = 60.0,
    ) -> None:
        """Join the group; returns when all its members have.

        `placement` is where experts are now; without one this rank holds nothing yet, and waits for the others to
        invite it by `regroup`. `staging` is memory or a number of rows (default: two layers of slots). `verify`:
        compare what arrives with digests taken now (default: if the processor can read the weights). `communicator`:
        a name; `measured`: the fastest, with `options` of each by its name; `auto`: that for members on different
        hosts, if there are no options, and else the one of the highest priority.
        """
        until = time.monotonic() + deadline
        self.layout, self._engine, self._source = layout, engine, source
        self._patience, self._topology = patience, topology
        self._closed, self._cycle = False, 0
        self._held = np.full((len(layout.layers), layout.slots), EMPTY, dtype=np.int32)
        self._lost: dict[str, str] = {}
        self.outcome: Outcome | None = None  # what became of the last rebalance; None before the first
        self._counted: dict[str, float] = {}
        #: Held while rows of a layer are read or written as a whole: a commit, a reload.
        self._layers = threading.Lock()
        #: Layer and expert of rows that an engine has loaded since digests were taken.
        self._reloaded: set[tuple[int, int]] = set()
        self._membership = Membership(rendezvous, group, layout.num_logical)
        rows = staging or 2 * layout.slots
        self.staging = rows if isinstance(rows, Staging) else Staging.on_host(layout.kinds, rows)
        self._rows = Rows(layout, self.staging, copy)
        self._verify = _verifiable(layout, verify)
        if placement is None:
            group = self._membership.accept(deadline)
        else:
            self._check(placement, group)
            self._held = placement.by_rank[:, group.me].copy()
        self._digests = self._own_digests()
        #: How the communicator was chosen, if it was measured.
        self.choice: Choice | None = None
        self._session = self._opened(rendezvous, communicator, options or {}, late=placement is None, until=until)
        try:
            self._control = self._session.control or StoreControl(rendezvous, group)
            self._adopt(self._membership.exchange(self._held, self._digests, until - time.monotonic()))
        except BaseException:
            self.close()
            raise
        export("rebalancer", self.samples, METRICS)

    # -- what is

    @property
    def group(self) -> Group:
        """The members of this epoch."""
        return self._membership.group

    @property
    def placement(self) -> Placement:
        """Which expert is in which slot of the group, as all members said or committed since."""
        return self._placement

    @property
    def lost(self) -> Mapping[str, str]:
        """Members that were lost in this epoch, and why: `regroup` goes on without them."""
        return dict(self._lost)

    @property
    def verifies(self) -> bool:
        """Whether rows are compared with digests."""
        return self._verify

    def statistics(self) -> Mapping[str, float]:
        """What was moved, what failed, and how long it took, since this rank joined."""
        return dict(self._counted)

    def samples(self) -> list[Sample]:
        """The same, and what is true now, as values of `vocabulary.METRICS`; any thread may ask."""
        if self._closed:
            return []
        group, now = self.group, Counters(METRICS, group=self.group.path, member=self.group.name)
        now.set("eplb_members", len(group.members) - len(self._lost), state="there")
        now.set("eplb_members", len(self._lost), state="lost")
        now.set("eplb_quarantined_rows", self.staging.quarantined)
        return samples(self.statistics(), now)

    # -- moving

    def rebalance(
        self,
        new: Placement,
        deadline: float = 30.0,
        *,
        engine: Engine | None = None,
        stop: threading.Event | None = None,
    ) -> Outcome:
        """Move to another placement; every rank calls it with the same one.

        Returns when every layer is decided: it has its new rows and map on all ranks, or its old ones on all. Raises
        `PeerLost` when members were lost, with `outcome` saying what became of the layers: then call `regroup`; and
        `Excluded` when this one is. `engine` takes the layers over instead of the one that was given at first; when
        `stop` is set, layers that are not agreed yet keep their old rows everywhere.
        """
        self._open()
        if self._lost:
            raise PeerLost.because("A rebalance was asked for.", f"{self._names(self._lost)}; regroup first")
        self._check_target(new)
        plan = TransferPlan.make(self._placement, new, self._topology_of(), copies=self._copies())
        self._cycle += 1
        terms = Terms(
            self._session, self._control, self.staging, self._rows, self._locked(engine or self._engine),
            self.group.epoch, self._cycle, self.group.me, self._digests if self._verify else None,
            self._source, self._patience, stop or threading.Event(),
        )  # fmt: skip
        outcome = Cycle(plan, terms, deadline).run()
        self._take(plan, outcome)
        return outcome

    def regroup(
        self, members: Sequence[str] | None = None, *, reloaded: bool = False, deadline: float = 30.0
    ) -> Placement:
        """Go on in the next epoch: with these members, or with all that are not lost.

        Returns what all of them truly hold, which is what maps must say from now on. `reloaded`: the weights are
        others now, so take their digests anew.
        """
        self._open()
        until = time.monotonic() + deadline
        group = self._membership.regroup(members, list(self._lost), deadline)
        self._session.regroup(group, until - time.monotonic())
        if isinstance(self._control, StoreControl):
            self._control.regroup(group)
        self._drain()
        own = self._own_digests() if reloaded else self._digests_of_held()
        truth = self._membership.exchange(self._held, own, until - time.monotonic())
        with self._layers:  # a row that is being read is compared with the digests of before, and told by them
            self._adopt(truth)
            if reloaded:
                self._reloaded.clear()
        return self._placement

    @contextlib.contextmanager
    def reloading(self, layer: int, expert: int) -> Iterator[list[dict[str, Region]]]:
        """The rows of an expert here, wherever it is now, for as long as they are overwritten; nothing commits then."""
        with self._layers:
            slots = np.flatnonzero(self._held[layer] == expert).tolist()
            yield [self._rows.live(layer, slot) for slot in slots]
            self._reloaded.add((layer, expert))

    def check_row(self, layer: int, slot: int) -> tuple[int, bool] | None:
        """The expert in a slot here, and whether its row is what was loaded; reads the row.

        None if that cannot be said: the slot is empty, nobody took a digest, or the expert was reloaded since. Any
        thread may ask; a commit and a reload wait for one row.
        """
        self._open()
        with self._layers:
            expert = int(self._held[layer, slot])
            known = UNKNOWN if expert == EMPTY else int(self._digests[layer, expert])
            if known == UNKNOWN:
                return None
            right = self._rows.live_digest(layer, slot) == known
            if right:
                self._reloaded.discard((layer, expert))  # it was loaded again, as it had been
            return None if (layer, expert) in self._reloaded else (expert, right)

    def audit(self) -> list[tuple[int, int, int]]:
        """Layer, slot and expert of rows here that are not what was loaded; reads all weights at once.

        `tensorway_eplb.audit.Audit` does so beside a serving loop.
        """
        checked = ((layer, slot, self.check_row(layer, slot)) for layer, slot in np.ndindex(*self._held.shape))
        return [(layer, slot, found[0]) for layer, slot, found in checked if found is not None and not found[1]]

    def close(self, deadline: float = 5.0) -> None:
        """Leave; the second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._session.close(deadline)
        if isinstance(control := getattr(self, "_control", None), StoreControl):
            control.close()
        self._membership.close()

    def __enter__(self) -> Rebalancer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- inside

    def _opened(
        self, rendezvous: Rendezvous, communicator: str, options: Mapping[str, object], *, late: bool, until: float
    ) -> Session:
        """A session; if it is measured which one, who is invited later uses what the others use."""
        where, left = (rendezvous, self.group, self.layout, self.staging), _MEASURING * (until - time.monotonic())
        if communicator == MEASURED:
            candidates = installed(options)
            self.choice = decided(*where[:2], candidates) if late else fastest(*where, left, candidates)
        elif communicator == AUTO and not options:  # options are of the one that its user expects
            self.choice = decided(*where[:2]) if late else fastest_if_apart(*where, left)
        if self.choice is not None:
            communicator, options = self.choice.name, self.choice.options
        elif communicator == MEASURED:
            raise BackendUnavailable(
                "The communicator that this group has measured was to be used.",
                "It has measured none.",
                "Ask for the same communicator on every member.",
            )
        context = EplbContext(self.group, self.layout, self.staging, rendezvous, until - time.monotonic())
        session: Session = tensorway.create("eplb_communicator", communicator, dict(options), context=context)
        return session

    def _take(self, plan: TransferPlan, outcome: Outcome) -> None:
        """Remember what a cycle did, and raise what it could not do."""
        rows = self._placement.map.copy()
        layers = list(outcome.committed)
        rows[layers] = plan.new.map[layers]
        self._placement = Placement(rows, plan.new.num_logical, plan.new.ranks, plan.old.epoch + 1)
        gone = {**outcome.left, **outcome.lost}
        self._lost.update({self.group.members[rank]: why for rank, why in gone.items()})
        self._count(outcome)
        asked = f"A rebalance of {len(plan.layers)} layers was asked for."
        true = f"{len(outcome.committed)} of them are committed, and the others keep their old weights"
        self.outcome = outcome
        if outcome.excluded_by is not None:
            who = self.group.members[outcome.excluded_by]
            raise Excluded(asked, f"Member {who} holds this one for lost. {true}.", "Regroup, or start it anew.")
        if outcome.lost:
            raise PeerLost(asked, f"Lost: {self._names(self._lost)}. {true}.", "Call regroup() on all that are left.")

    def _locked(self, engine: Engine) -> _Locked:
        me, slots = self.group.me, self.layout.slots

        def taken(layer: int, experts: Map) -> None:
            self._held[layer] = experts[me * slots : (me + 1) * slots]

        return _Locked(engine, self._layers, taken)

    def _count(self, outcome: Outcome) -> None:
        counts: dict[str, float] = {
            "rebalances": 1,
            "layers_committed": len(outcome.committed),
            "rebalances_skipped": float(not outcome.committed and not outcome.aborted),  # it was there already
            "layers_aborted": len(outcome.aborted),
            **{f"layers_aborted_{cause.value}": list(outcome.causes.values()).count(cause) for cause in Cause},
            "stalls": outcome.stalls,
            "members_lost": len(outcome.lost),
            **{f"{phase}_seconds": spent for phase, spent in outcome.seconds.items()},
            **{name: float(getattr(outcome.counts, name)) for name in outcome.counts.__slots__ if name[0] != "_"},
        }
        for name, value in counts.items():
            self._counted[name] = self._counted.get(name, 0.0) + value

    def _adopt(self, truth: Truth) -> None:
        self._placement, self._digests = truth.placement, truth.digests
        self._lost = {}
        self._cycle = 0

    def _own_digests(self) -> Digests:
        """Of what is in the slots now: [layers, slots]."""
        found = np.zeros(self._held.shape, dtype=np.uint64)
        if self._verify:
            for layer, slot in np.argwhere(self._held >= 0).tolist():
                found[layer, slot] = self._rows.live_digest(layer, slot)
        return found

    def _digests_of_held(self) -> Digests:
        """As the table says: what is in a slot was verified when it came."""
        layers = np.arange(len(self._held))[:, None]
        found: Digests = np.where(self._held >= 0, self._digests[layers, np.maximum(self._held, 0)], np.uint64(UNKNOWN))
        return found

    def _drain(self) -> None:
        for event in self._session.poll(0.0):
            settle_event(event, self.staging)

    def _copies(self) -> set[tuple[int, int]]:
        """Of experts that nobody holds: which can be loaded."""
        source = self._source
        return {which for which in self._placement.lost if source is not None and source.has(*which)}

    def _topology_of(self) -> Topology:
        ranks = len(self.group.members)
        known = self._topology
        return known if known is not None and len(known.nodes) == ranks else Topology.flat(ranks)

    def _names(self, lost: Mapping[str, str]) -> str:
        return "; ".join(f"{name} ({why})" for name, why in sorted(lost.items()))

    def _open(self) -> None:
        if self._closed:
            raise Closed("A rebalancer was used.", "It is closed.", "Make another.")

    def _check_target(self, new: Placement) -> None:
        gone = set(new.lost) - set(self._placement.lost)
        if gone:
            named = ", ".join(f"{expert} of layer {layer}" for layer, expert in sorted(gone)[:_NAMED])
            raise PlacementInvalid(
                "A rebalance was asked for.",
                f"The new placement leaves out {len(gone)} experts that are held now: {named}.",
                "Give every expert a slot: nobody would have it any more.",
            )

    def _check(self, placement: Placement, group: Group) -> None:
        mine = (len(self.layout.layers), len(group.members), self.layout.slots, self.layout.num_logical)
        its = (placement.layers, placement.ranks, placement.slots, placement.num_logical)
        if mine != its:
            raise PlacementInvalid(
                "A group was to be joined with a placement.",
                f"It has layers, ranks, slots and experts {its}; the layout and the group have {mine}.",
                "Give the placement by which the weights were loaded.",
            )


def _verifiable(layout: ExpertLayout, wanted: bool | None) -> bool:
    if wanted and not layout.host_visible:
        raise PlacementInvalid("Rows were to be verified.", "The processor cannot read them.", "Give verify=False.")
    return layout.host_visible if wanted is None else wanted


class _Locked:
    """The engine's commit, while nobody reads or writes rows of its own; `taken` is told what the slots hold then."""

    def __init__(self, engine: Engine, lock: threading.Lock, taken: Callable[[int, Map], None]) -> None:
        self._engine, self._lock, self._taken = engine, lock, taken

    def commit(self, layer: int, experts: Map, write: Callable[[], None]) -> Pending | None:
        def locked() -> None:
            with self._lock:
                write()
                self._taken(layer, experts)

        return self._engine.commit(layer, experts, locked)
