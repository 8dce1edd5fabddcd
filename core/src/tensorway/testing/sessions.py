"""What every communicator of expert weights must do, proven with real processes: bytes, members that end, nothing left.

Room `testing`. Subclass `SessionSuite`, set `name` (and `options`), install your dist. Weights are in host memory. What
is declared is the gate: who needs no sender is not asked for `Served`, who cannot regroup must refuse it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any, ClassVar, Final

import pytest

from tensorway.testing import session_misuse as misuses
from tensorway.testing import session_ranks as does
from tensorway.testing.possessions import kept_growing
from tensorway.testing.ranks import Place, RankFailed, Ranks
from tensorway.testing.session_groups import Members, kinds, lent, place
from tensorway.testing.session_ranks import Shape, moves_among
from tensorway.testing.suite import Suite

#: For what needs no more than a poll; busy machines take long to do anything.
SOON: Final = 30.0
#: Rows that are small and large, that lie apart, and of which one layer has what another has not.
LAYERS: Final = (
    (("w13", 300_000, 0), ("w2", 131_072, 64), ("scale", 48, 0)),
    (("w13", 300_000, 0), ("scale", 48, 0), ("bias", 70_001, 3)),
    (("tiny", 1, 0),),
)
#: For many cycles.
EVERYDAY: Final = ((("w", 131_072, 0), ("scale", 48, 0)),) * 2

Enter = Callable[..., Members]


class SessionSuite(Suite):
    """The contract of `tensorway.eplb.Session`."""

    #: The backend's name, as `tensorway.create("eplb_communicator", name)` takes it.
    name: str
    options: ClassVar[dict[str, object]] = {}
    #: Weights are in memory of `tensorway.memory.shared`, as staging is: for a communicator that takes no other.
    shared_memory: ClassVar[bool] = False
    #: The bytes of a row that is under way for a while: more than all buffers of a connection hold.
    large: ClassVar[int] = 64 << 20

    _ranks: ClassVar[Ranks | None] = None

    @classmethod
    def teardown_class(cls) -> None:
        """End the processes that tests have shared."""
        ranks, cls._ranks = cls._ranks, None
        if ranks is not None:
            ranks.close()

    @pytest.fixture
    def ranks(self) -> Iterator[Ranks]:
        """Processes that all tests share."""
        owner = type(self)
        owner._ranks = owner._ranks or Ranks()
        with lent(owner._ranks) as ranks:
            yield ranks

    @pytest.fixture
    def enter(self, ranks: Ranks) -> Enter:
        """Open a session in each of these processes, as one group."""

        def entered(
            indices: Sequence[int],
            layers: Any = LAYERS,
            function: Callable[..., Any] = does.open_session,
            rows: int = 54,
        ) -> Members:
            shape = Shape(layers, 6 if rows > 2 else 2, rows, self.shared_memory)
            return Members.enter(ranks, indices, (self.name, self.options, shape), function)

        return entered

    @property
    def one_large_row(self) -> Any:
        """Layers of which one fetch takes a while."""
        return ((("w", self.large, 0),),)

    # -- bytes

    @pytest.mark.parametrize("count", [2, 3, 4])
    def test_every_byte_of_every_row_arrives(self, enter: Enter, count: int) -> None:
        """Several layers, tensors, lengths and gaps, between all members at once; and no live row is written to.

        *If this fails:* compare how the rows of a layer are addressed: `slot * stride`, every tensor from its own base.
        """
        group = enter(range(count))
        for cycle in range(4):
            moves = moves_among(count, layers=3, slots=6, most=6 if count == 2 else 4, seed=cycle)
            assert [] == group.exchange(moves, cycle)
        assert [[]] * count == group.each(does.spoilt)

    def test_only_the_rows_that_were_named_are_written(self, enter: Enter) -> None:
        """Staging around them stays as it was, to the byte.

        *If this fails:* see that a row has exactly `row_bytes` bytes in staging, and none of the gap behind it.
        """
        group = enter([0, 1])
        group[0].call(does.mark)
        group[0].call(does.post, 0, 1, [5, 0, 3])
        group[1].call(does.serve, 0, 0, [5, 0, 3])
        named = group[0].call(does.asked_for)
        assert ["Filled"] == kinds(group[0].call(does.settle, SOON))
        assert named == group[0].call(does.unmarked)

    def test_moves_may_be_asked_for_in_another_order_on_each_side(self, enter: Enter) -> None:
        """A layer's rows find their fetch, whatever was posted before it.

        *If this fails:* tell messages apart by cycle, layer and peer, not by the order in which they were asked for.
        """
        group = enter([0, 1])
        moves = moves_among(2, layers=3, slots=6, most=5, seed=1)
        for index, some in ((0, moves), (1, moves[::-1])):
            group[index].start(does.exchange, group.place(index), some, 7)
        assert [[], []] == [group[index].result() for index in (0, 1)]

    def test_ranks_are_those_of_the_group(self, enter: Enter) -> None:
        """Two groups of some processes, in an order of their own, both at work.

        *If this fails:* take ranks from `Group`, never from the application's process group or the environment.
        """
        first, second = enter([3, 2]), enter([0, 1])
        for cycle in range(2):
            moves = moves_among(2, layers=3, slots=6, most=6, seed=cycle)
            assert [] == first.exchange(moves, cycle) + second.exchange(moves, cycle)

    def test_a_cycle_may_move_nothing_and_a_group_may_be_one(self, enter: Enter) -> None:
        """Neither is special for who plans.

        *If this fails:* connect to nobody if `Group.others` is empty; let `begin` take empty lists.
        """
        assert [] == enter([0, 1]).exchange([], 0)
        alone = enter([2])
        assert [] == alone.exchange([], 0)
        assert [] == alone[2].call(does.listen, 0.01)[0]

    def test_the_host_constructs_it_by_its_name(self, enter: Enter) -> None:
        """As an engine does: probed, options checked, everything from the context.

        *If this fails:* see that the factory needs nothing but its options and the `EplbContext`.
        """
        group = enter([0, 1], function=does.create_session)
        assert [] == group.exchange(moves_among(2, layers=3, slots=6, most=3, seed=3), 0)
        assert group.capabilities.initiator in ("receiver", "both")
        assert "cpu" in group.capabilities.devices and group.capabilities.max_layers_in_flight >= 1

    # -- waiting

    def test_who_waits_is_woken_returns_in_time_and_sleeps(self, enter: Enter) -> None:
        """`poll` waits no longer than it was told, ends when something happens, and leaves the processor to others.

        *If this fails:* bound every wait by what `poll` is given; between looks sleep, and do not spin.
        """
        group = enter([0, 1])
        told, took, _ = group[0].call(does.listen, 0.0)
        assert ([], True) == (told, took < SOON)
        if group.both:  # nothing comes before it is served
            group[0].call(does.post, 0, 1, [0])
        told, took, busy = group[0].call(does.wait_out, 1.0)
        assert ([], True) == (told, took < SOON)
        assert busy < took / 4, "processor time of who polls and has nothing to do"
        if not group.both:
            group[0].call(does.post, 0, 1, [0])
        group[0].start(does.listen, SOON)
        time.sleep(0.3)
        group[1].call(does.serve, 0, 0, [0])
        told, took, _ = group[0].result()
        assert ["Filled"] == kinds(told)
        assert took < SOON, "nothing was told before the time was over"

    def test_an_idle_session_leaves_the_processor_alone(self, enter: Enter) -> None:
        """Between rebalances the processor is the engine's.

        *If this fails:* let threads of yours wait for something to happen, not look for it.
        """
        group = enter([0, 1])
        assert [] == group.exchange(moves_among(2, layers=3, slots=6, most=3, seed=3), 0)
        assert all(busy < 0.2 for busy in group.each(does.idle, 2.0)), "seconds of processor time in 2 seconds"

    # -- fetches that are given up

    def test_what_is_cancelled_fails_once_or_was_there_before(self, enter: Enter) -> None:
        """One `Failed` with the reason, or `Filled`; and if its rows were not released, `Drained`, later.

        *If this fails:* say `Failed` at `cancel`, and not again when the fabric has let go: then say `Drained`.
        """
        group = enter([0, 1])
        group[0].call(does.post, 0, 1, [1, 2])
        told = group[0].call(does.give_up, "too late")
        group[1].call(does.serve, 0, 0, [1, 2])
        assert 0 == group[0].call(does.drain, SOON)
        later = group[0].call(does.listen, 0.2)[0]
        ends = [each for each in told if each.kind in ("Filled", "Failed")]
        assert 1 == len(ends), told
        end = ends[0]
        assert end.kind == "Filled" or "too late" in end.why
        assert {"Drained"} >= set(kinds(told + later)) - {end.kind}, told + later
        assert end.kind == "Filled" or not later or not end.released

    def test_a_second_attempt_does_not_get_the_rows_of_the_first(self, enter: Enter) -> None:
        """The n-th fetch of a layer from a member in a cycle meets the n-th send there.

        *If this fails:* count fetches and sends of (cycle, layer, peer) on both sides, those that were cancelled, too.
        """
        group = enter([0, 1])
        group[0].call(does.post, 0, 1, [1, 2], 4, 0)
        group[0].call(does.give_up, "too late")
        group[0].call(does.post, 0, 1, [3], 4, 1)
        for slots in ([1, 2], [3]):
            group[1].call(does.serve, 0, 0, slots, 4)
        assert ["Filled"] == [kind for kind in kinds(group[0].call(does.settle, SOON)) if kind != "Drained"]

    def test_a_fetch_that_nobody_serves_fails_at_its_deadline(self, enter: Enter) -> None:
        """Also when the session has nothing else to do, and later fetches work.

        *If this fails:* keep the deadline of `post`; a `poll` that waits for longer must wake for it.
        """
        group = enter([0, 1])
        if not group.both:
            pytest.skip("nobody has to serve")
        group[0].call(does.post, 0, 1, [0], 0, 0, 0.5)
        told = group[0].call(does.settle, SOON)
        assert [(0, "Failed")] == [(each.cycle, each.kind) for each in told], told
        assert "deadline" in told[0].why, told
        group[1].call(does.serve, 0, 0, [0])
        assert 0 == group[0].call(does.drain, SOON)
        assert {"Drained"} >= set(kinds(group[0].call(does.listen, 0.2)[0]))
        assert [] == group.exchange([(0, 0, 1, (0, 1)), (0, 1, 0, (1,))], 1)

    # -- members that end

    @pytest.mark.parametrize("served", [False, True], ids=["before it serves", "while it serves"])
    def test_a_killed_peer_fails_what_is_asked_of_it_and_nothing_else(self, enter: Enter, served: bool) -> None:
        """Each fetch from it ends, who has moves with it is told once that it is lost, and the others go on.

        *If this fails:* look for the end of a peer's process or connection whenever something of it is under way, say
        `PeerFailed` once for each peer, and to who only sends as well.
        """
        group = enter([0, 1, 2], self.one_large_row, rows=3) if served else enter([0, 1, 2])
        if served:
            group[2].call(does.serve, 0, 0, [0])
        group[0].call(does.post, 0, 2, [0])
        group[0].call(does.post, 0, 2, [1], 1)
        group[1].call(does.serve, 0, 2, [1])
        group[2].signal(SIGKILL)
        group[0].call(does.post, 0, 2, [0], 2)
        told = group[0].call(does.settle, SOON, [2])
        beside = group[1].call(does.settle, SOON, [2]) if group.both else group[1].call(does.listen, 0.2)[0]
        assert {"PeerFailed"} >= set(kinds(beside)), beside
        assert 1 == kinds(told).count("PeerFailed"), told
        assert 1 >= len(beside), beside
        assert beside or not group.both, "who only sends to it was not told"
        told += beside
        ends = sorted((each.cycle, each.kind) for each in told if each.kind in ("Filled", "Failed"))
        assert [0, 1, 2] == [cycle for cycle, _ in ends], told
        assert (2, "Failed") in ends, told
        assert not group.both or (1, "Failed") in ends, told
        assert {2} == {each.peer for each in told}, told
        assert 0 == group[0].call(does.drain, SOON)
        group.indices = (0, 1)
        self.go_on_beside(group)

    def go_on_beside(self, group: Members) -> None:
        """Members 0 and 1 of three move rows, and may be told that 2 is lost, and has let go of rows."""
        members = tuple(f"p{index}" for index in range(3))
        moves = [(0, 0, 1, (0, 1)), (0, 1, 0, (1,))]
        for me in (0, 1):
            group[me].start(does.exchange, Place(group.path, members, me, group.epoch), moves, 5, [2])
        assert [[], []] == [group[me].result() for me in (0, 1)]

    @pytest.mark.parametrize("served", [False, True], ids=["before it serves", "after it served"])
    def test_a_stopped_peer_writes_nothing_into_rows_that_were_released(self, enter: Enter, served: bool) -> None:
        """Rows are in quarantine until nobody writes to them any more, at the latest when the peer has gone on, too.

        *If this fails:* say `released=False` while the fabric has the memory, `Drained` when it has let go; and let go
        when the group is formed anew, if the fabric can.
        """
        group = enter([0, 1, 2], self.one_large_row, rows=2)
        if served:
            group[2].call(does.serve, 0, 0, [0])
        group[2].signal(SIGSTOP)
        group[0].call(does.post, 0, 2, [0])
        told = group[0].call(does.listen, 1.0)[0]
        assert {"Filled"} >= set(kinds(told)), "a peer that is silent is not lost; who waits for it has a deadline"
        told += group[0].call(does.give_up, "too late")
        assert kinds(told) in (["Filled"], ["Failed"], ["Failed", "Drained"]), told
        if group.capabilities.regroup:
            assert {"Drained"} >= {each.kind for some in group.regroup([0, 1]).values() for each in some}
        # Not every library takes back what it has asked of a silent peer.
        held = group[0].call(does.drain, 1.0)
        if not held:
            group[0].call(does.mark)
        group[2].signal(SIGCONT)
        if not served:
            group[2].call(does.serve, 0, 0, [0])
        assert 0 == group[0].call(does.drain, SOON)
        if held:
            group[0].call(does.mark)
        if group.capabilities.regroup:
            assert {"Drained"} >= set(kinds(group[0].call(does.listen, 1.0)[0]))
            assert set() == group[0].call(does.unmarked)
            assert [] == group.exchange([(0, 0, 1, (0, 1)), (0, 1, 0, (1,))], 0)

    def test_members_go_and_come_back(self, enter: Enter) -> None:
        """Fewer, others, one alone, more, in any order; ranks change, and every byte is right.

        *If this fails:* see that nothing is kept by rank across `regroup`; or do not declare `regroup`.
        """
        group = enter([0, 1, 2])
        if not group.capabilities.regroup:
            with pytest.raises(RankFailed, match="Unsupported"):
                group[0].call(does.regroup, place(group.path, [0, 1], 0, 1))
            return
        for epoch, indices in enumerate([[0, 1], [1, 2, 0], [2], [3, 0, 2, 1]], start=1):
            group.ranks.grow(4)
            assert set() == {each.kind for told in group.regroup(indices).values() for each in told}
            for cycle in (2 * epoch, 2 * epoch + 1):
                moves = moves_among(len(indices), layers=3, slots=6, most=3, seed=epoch)
                assert [] == group.exchange(moves, cycle)

    def test_a_member_that_was_killed_is_replaced_by_one_of_its_name(self, enter: Enter) -> None:
        """A new process takes the name, and the others regroup with it.

        *If this fails:* connect anew to a member whose process is another one than before.
        """
        group = enter([0, 1])
        if not group.capabilities.regroup:
            pytest.skip("needs the capability regroup")
        assert [] == group.exchange(moves_among(2, layers=3, slots=6, most=3, seed=1), 0)
        group[1].signal(SIGKILL)
        group.ranks.grow(2)
        group.opened.remove(1)
        group.regroup([1, 0])
        assert [] == group.exchange(moves_among(2, layers=3, slots=6, most=3, seed=2), 1)

    def test_who_does_not_come_is_named_in_time_and_nothing_is_left(self, ranks: Ranks) -> None:
        """Opening has a deadline, and may be tried again.

        *If this fails:* bound every step by the context's deadline, close what was opened, and name who is missing.
        """
        ranks.grow(2)
        path, opening = f"/suite/{uuid.uuid4().hex}", (self.name, self.options, Shape(LAYERS, 6, 6, self.shared_memory))
        counts = []
        for _ in range(3):
            with pytest.raises(RankFailed, match="p1"):
                ranks[0].call(does.open_session, place(path, [0, 1], 0), *opening, 3.0, seconds=SOON)
            counts.append(ranks[0].call(does.counted)[:2])
        assert not kept_growing(counts), f"threads and files of attempts that failed are still there: {counts}"
        for index in (0, 1):
            ranks[index].start(does.open_session, place(path, [0, 1], index), *opening)
        assert ranks[0].result() == ranks[1].result()

    # -- messages

    def test_messages_keep_their_order_and_strangers_are_not_heard(self, enter: Enter) -> None:
        """Two hundred from each member, in order and with its rank; none from who has been left out.

        *If this fails:* name senders by who is connected, and look them up among the members of now.
        """
        group = enter([0, 1, 2])
        if not group.control:
            pytest.skip("it has no channel for messages, and the rendezvous is used")
        payloads = [bytes([number]) * (number % 50) for number in range(200)]
        for index in (1, 2):
            group[index].start(does.send_messages, 0, payloads)
        heard = group[0].call(does.receive_messages, 400, SOON)
        assert ["", ""] == [group[index].result() for index in (1, 2)]
        for peer in (1, 2):
            assert payloads == [payload for sender, payload in heard if sender == peer]
        if group.capabilities.regroup:
            group.regroup([1, 0])
            group[2].call(does.send_messages, 0, [b"stranger"])
            time.sleep(0.5)
            assert "" == group[1].call(does.send_messages, 1, [b"member"])
            assert [(0, b"member")] == group[0].call(does.receive_messages, 1, SOON)

    # -- ends

    def test_closed_while_rows_are_under_way(self, enter: Enter) -> None:
        """Once and again, without waiting for anybody; then it refuses, and its peers' fetches from it fail.

        *If this fails:* end everything in `close`, remember that it is done, and raise `Closed` from then on.
        """
        group = enter([0, 1], self.one_large_row, rows=3)
        group[0].call(does.post, 0, 1, [0])
        group[0].call(does.serve, 0, 1, [1])
        group[1].call(does.post, 0, 0, [1])
        took, raised = group[0].call(misuses.close_twice, group.place(0))
        assert took < SOON
        assert ["Closed"] * len(raised) == raised
        ends = [kind for kind in kinds(group[1].call(does.settle, SOON)) if kind != "PeerFailed"]
        assert ends in (["Failed"], ["Filled"])
        assert "Failed" in group[1].call(does.settle_one_by_one, 0, 0, SOON)
        group[0].call(does.close_session)

    def test_what_is_out_of_range_is_refused_before_anything_moves(self, enter: Enter) -> None:
        """Ranks, layers, slots, rows and cycles that do not exist, and as many slots as rows.

        *If this fails:* check all numbers of a `Fetch` or `Send` before the fabric sees the first (`check_move`).
        """
        group = enter([0, 1])
        group[0].call(does.mark)
        for what, error in group[0].call(misuses.refusals).items():
            assert "TensorwayError" in error, f"{what}: {error or 'taken'}"
        assert [] == group[0].call(does.listen, 0.2)[0], "something was told of a fetch that was refused"
        assert set() == group[0].call(does.unmarked)
        assert [] == group.exchange(moves_among(2, layers=3, slots=6, most=3, seed=3), 0)

    def test_a_forked_child_is_refused_and_the_parent_goes_on(self, enter: Enter) -> None:
        """Engines fork; connections belong to one process.

        *If this fails:* remember `os.getpid()`, raise `Closed` in another process, and let `close` do nothing there.
        """
        group = enter([0, 1])
        assert 7 == group[0].call(misuses.use_in_a_child)
        assert [] == group.exchange(moves_among(2, layers=3, slots=6, most=3, seed=3), 0)

    def test_nothing_is_left_of_cycles(self, enter: Enter) -> None:
        """No thread, no file and no memory of 150 cycles.

        *If this fails:* drop what belongs to a fetch when its last event is told.
        """
        group = enter([0, 1], EVERYDAY)
        moves = moves_among(2, layers=2, slots=4, most=3, seed=3)
        counts = []
        for cycle in range(180):
            assert [] == group.exchange(moves, cycle)
            if cycle in (29, 79, 129, 179):
                counts.append(group.each(does.counted))
        for looks in zip(*counts, strict=True):
            assert not kept_growing(look[:2] for look in looks), f"threads and files: {counts}"
            assert looks[-1][2] - looks[0][2] < 8 << 20, "bytes that 150 cycles took"

    def test_nothing_is_left_of_groups(self, enter: Enter) -> None:
        """No thread and no file of twelve groups that were formed anew, with the same members in another order.

        *If this fails:* in `regroup`, close what only the old group needed, and end who waited for its members.
        """
        group = enter([0, 1], EVERYDAY)
        if not group.capabilities.regroup:
            pytest.skip("needs the capability regroup")
        moves, counts = moves_among(2, layers=2, slots=4, most=3, seed=3), []
        for epoch in range(12):
            group.regroup([1, 0] if epoch % 2 else [0, 1])
            assert [] == group.exchange(moves, epoch)
            counts.append([number for index in (0, 1) for number in group[index].call(does.counted)[:2]])
        assert not kept_growing(counts[::3]), f"threads and files of both: {counts}"

    def test_nothing_is_left_of_sessions(self, enter: Enter) -> None:
        """No thread and no file of six sessions that were opened, used and closed.

        *If this fails:* end threads and close connections in `close`; a destructor may never run.
        """
        moves, counts = moves_among(2, layers=2, slots=4, most=3, seed=3), []
        for _ in range(6):
            group = enter([0, 1], EVERYDAY)
            assert [] == group.exchange(moves, 0)
            group.each(does.close_session)
            counts.append([number for count in group.each(does.counted) for number in count[:2]])
        assert not kept_growing(counts[1::2]), f"threads and files of both: {counts}"
