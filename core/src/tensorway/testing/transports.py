"""What every transport must do, proven with real processes: bytes, order, refusals, loss, and nothing left behind.

Room `testing`. Subclass `TransportSuite`, set `name` (and `options`), install your dist. Declared capabilities are
the gates: what is declared must work, what is not must raise `Unsupported`.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from tensorway.errors import (
    Closed,
    DeadlineExceeded,
    DescriptionInvalid,
    MemoryInvalid,
    PeerLost,
    TensorwayError,
    TransferCancelled,
    Unsupported,
)
from tensorway.testing.peer import PeerProcess, allocated, content, digest
from tensorway.testing.possessions import left_of
from tensorway.testing.suite import Suite
from tensorway.testing.waiting import eventually
from tensorway.transport import BlockTable, Peer, Route, State, Transport

BLOCK = 4096
COUNT = 64
NBYTES = BLOCK * COUNT
#: How much later than its deadline a failure may be seen on a busy machine.
SLACK = 2.0
#: Seconds in which what is due without a deadline of its own comes about.
PATIENCE = 10.0


class TransportSuite(Suite):
    """The contract of `tensorway.transport.contract.Transport`."""

    #: The backend's name, as `tensorway.create("transport", name)` takes it.
    name: str
    options: ClassVar[dict[str, object]] = {}
    #: Register memory of `tensorway.memory.shared` on both sides: for a transport that takes no other.
    shared_memory: ClassVar[bool] = False

    @pytest.fixture
    def transport(self) -> Iterator[Transport]:
        """An endpoint in this process."""
        import tensorway

        endpoint = tensorway.create("transport", self.name, self.options)
        yield endpoint
        endpoint.close()

    @pytest.fixture
    def peer(self) -> Iterator[PeerProcess]:
        """An endpoint in another process."""
        other = PeerProcess(self.name, self.options, shared_memory=self.shared_memory)
        yield other
        other.close()

    @pytest.fixture
    def pair(self, transport: Transport, peer: PeerProcess) -> tuple[Transport, PeerProcess, Route, Any]:
        """Both connected, with memory on both sides and a route over all of it."""
        peer.register(NBYTES, seed=1)
        mine = self.memory(2)
        return transport, peer, route_to(transport, transport.connect(peer.describe()), mine), mine

    def memory(self, seed: int) -> Any:
        """Memory of this process to be registered, with content that `content(seed, NBYTES)` tells."""
        return allocated(content(seed, NBYTES), shared_memory=self.shared_memory)

    # -- bytes

    def test_a_read_brings_every_byte_to_its_place(self, pair: Any) -> None:
        """Blocks in random order, some of them: what was named arrives, what was not stays as it was.

        *If this fails:* compare how local and remote ids are paired, and how neighbors are joined.
        """
        transport, _, route, mine = pair
        theirs, before = content(1, NBYTES), bytes(mine)
        local, remote = random.Random(3).sample(range(COUNT), 40), random.Random(4).sample(range(COUNT), 40)
        transport.read(route, local, remote).wait()
        expected = bytearray(before)
        for here, there in zip(local, remote, strict=True):
            expected[here * BLOCK : (here + 1) * BLOCK] = theirs[there * BLOCK : (there + 1) * BLOCK]
        assert digest(expected) == digest(mine)

    def test_a_write_brings_every_byte_to_its_place(self, pair: Any) -> None:
        """The same in the other direction, checked in the peer's own memory.

        *If this fails:* as for reads; and see that `done` is not said before the bytes are there.
        """
        transport, peer, route, mine = pair
        if "write" not in transport.capabilities.operations:
            with pytest.raises(Unsupported):
                transport.write(route, [0], [0])
            return
        expected = content(1, NBYTES)
        local, remote = random.Random(5).sample(range(COUNT), 40), random.Random(6).sample(range(COUNT), 40)
        transport.write(route, local, remote).wait()
        for here, there in zip(local, remote, strict=True):
            expected[there * BLOCK : (there + 1) * BLOCK] = mine[here * BLOCK : (here + 1) * BLOCK]
        assert digest(expected) == peer.digest(0)

    def test_what_is_emulated_can_be_done_the_other_way_round(self, transport: Transport) -> None:
        """Of each lane one direction at most is emulated, and both are there: or nobody could turn it around.

        *If this fails:* correct `Capabilities.emulated`.
        """
        lanes = [lane for lane, _ in transport.capabilities.emulated]
        assert len(lanes) == len(set(lanes)) and (not lanes or len(transport.capabilities.operations) == 2)

    def test_adjacent_blocks_arrive_like_any_others(self, pair: Any) -> None:
        """Runs, all blocks in order, all in reverse: joining neighbors changes nothing but speed.

        *If this fails:* look at where a run of neighbors begins and ends.
        """
        transport, _, route, mine = pair
        theirs = content(1, NBYTES)
        transport.read(route, range(COUNT), range(COUNT)).wait()
        assert digest(theirs) == digest(mine)
        transport.read(route, range(COUNT), range(COUNT - 1, -1, -1)).wait()
        expected = b"".join(theirs[i * BLOCK : (i + 1) * BLOCK] for i in range(COUNT - 1, -1, -1))
        assert digest(expected) == digest(mine)

    def test_planes_and_strides_may_differ_on_both_sides(self, transport: Transport, peer: PeerProcess) -> None:
        """Two planes, blocks that are parts of larger ones, other counts here and there.

        *If this fails:* compare how a block's address is computed with `BlockTable`.
        """
        peer.register(NBYTES, seed=1)
        mine = self.memory(2)
        here = transport.register(mine).regions[0]
        other = transport.connect(peer.describe())
        there, half = other.regions[0], NBYTES // 2
        local = BlockTable((here.address, here.address + half), 512, 1024, half // 1024)
        remote = BlockTable((there.address + 64, there.address + half + 64), 512, BLOCK, half // BLOCK)
        ids = random.Random(7).sample(range(half // BLOCK), 20)
        transport.read(transport.prepare(other, local, remote), range(20), ids).wait()
        theirs, expected = content(1, NBYTES), content(2, NBYTES)
        for base in (0, half):
            for index, block in enumerate(ids):
                source = base + 64 + block * BLOCK
                expected[base + index * 1024 : base + index * 1024 + 512] = theirs[source : source + 512]
        assert digest(expected) == digest(mine)

    def test_rows_of_several_tensors_are_one_stacked_route(self, transport: Transport, peer: PeerProcess) -> None:
        """Stacked tables: ids run on from plane to plane, an id is one block, and bases may be in any order.

        *If this fails:* block `i` of plane `p` is `p * count + i`, here and there; move one block for each id.
        """
        peer.register(NBYTES, seed=1)
        mine = self.memory(2)
        here = transport.register(mine).regions[0]
        other = transport.connect(peer.describe())
        there, part = other.regions[0], NBYTES // 4
        local = BlockTable((here.address,), 512, 512, 40)
        bases = tuple(there.address + plane * part for plane in (2, 0, 3))
        remote = BlockTable(bases, 512, BLOCK, part // BLOCK, stacked=True)
        ids = random.Random(8).sample(range(remote.ids), 40)
        before, theirs = bytes(mine), content(1, NBYTES)
        transport.read(transport.prepare(other, local, remote), range(40), ids).wait()
        starts = [(2, 0, 3)[block // remote.count] * part + block % remote.count * BLOCK for block in ids]
        expected = b"".join(theirs[start : start + 512] for start in starts) + before[40 * 512 :]
        assert digest(expected) == digest(mine)
        with pytest.raises(MemoryInvalid):
            transport.prepare(other, local, BlockTable(bases, 512, BLOCK, part // BLOCK))

    def test_a_transfer_of_nothing_is_done(self, pair: Any) -> None:
        """No blocks is a transfer, too: planners need not treat it apart.

        *If this fails:* do not post when there is nothing to post.
        """
        transport, _, route, _ = pair
        transfer = transport.read(route, [], [])
        transfer.wait()
        assert (State.DONE, 0) == (transfer.state, transfer.nbytes)

    # -- notifications

    def test_a_notification_arrives_after_its_data(self, pair: Any) -> None:
        """When the peer sees it, all bytes of the write are in its memory.

        *If this fails:* send it when the data is known to be there, not when it is posted.
        """
        transport, peer, route, mine = pair
        if not transport.capabilities.notify or "write" not in transport.capabilities.operations:
            pytest.skip("needs the capabilities notify and write")
        transport.write(route, range(COUNT), range(COUNT), notify=b"request-7").wait()
        (seen,) = peer.notifications(1)
        assert b"request-7" == base64.b64decode(seen["payload"])
        assert [digest(mine)] == seen["digests"]

    def test_notifications_keep_their_order_and_their_bytes(self, transport: Transport, peer: PeerProcess) -> None:
        """Two hundred of them, empty, binary and as large as promised; larger ones are refused.

        *If this fails:* see how the fabric frames messages, and whether an empty one is mistaken for none.
        """
        other = transport.connect(peer.describe())
        if not transport.capabilities.notify:
            with pytest.raises(Unsupported):
                transport.notify(other, b"x")
            return
        sent = [b"", b"\x00\xff", b"x" * transport.capabilities.max_notification, *(b"%d" % i for i in range(200))]
        for payload in sent:
            transport.notify(other, payload)
        assert sent == [base64.b64decode(row["payload"]) for row in peer.notifications(len(sent), 30)]
        with pytest.raises(MemoryInvalid):
            transport.notify(other, b"x" * (transport.capabilities.max_notification + 1))

    def test_a_notification_names_its_sender(self, transport: Transport, peer: PeerProcess) -> None:
        """Name and incarnation of who sent it, so that a late one of an earlier life can be told apart.

        *If this fails:* send them with the connection, not with each payload's goodwill.
        """
        if not transport.capabilities.notify:
            pytest.skip("needs the capability notify")
        peer.connect(transport.describe())
        peer.notify(b"from there")
        seen = eventually(transport.notifications, PATIENCE)
        other = transport.connect(peer.describe())
        assert [(other.name, other.incarnation, b"from there")] == [(n.peer, n.incarnation, n.payload) for n in seen]

    # -- refusals

    @pytest.mark.parametrize(
        ("local", "remote"),
        [([COUNT], [0]), ([0], [COUNT]), ([-1], [0]), ([0], [1 << 32]), ([1.0], [0]), ([True], [0]), ([0, 1], [0])],
    )
    def test_ids_that_cannot_be_meant_are_refused(self, pair: Any, local: Any, remote: Any) -> None:
        """Out of range, negative, beyond 32 bits, no whole numbers, unequal counts: a typed error, and the link lives.

        *If this fails:* check ids before the library sees them; some move another block silently.
        """
        transport, _, route, mine = pair
        before = digest(mine)
        with pytest.raises(MemoryInvalid):
            transport.read(route, local, remote)
        assert before == digest(mine)
        transport.read(route, [0], [0]).wait()

    def test_a_block_is_not_written_twice_in_one_transfer(self, pair: Any) -> None:
        """Reading two blocks into one, or writing two into one, has no meaning.

        *If this fails:* require unique ids on the side that is written.
        """
        transport, _, route, _ = pair
        with pytest.raises(MemoryInvalid):
            transport.read(route, [3, 3], [1, 2])
        transport.read(route, [1, 2], [3, 3]).wait()

    def test_memory_that_is_not_registered_is_refused_on_both_sides(
        self, transport: Transport, peer: PeerProcess
    ) -> None:
        """A table that reaches beyond what is registered never becomes a route.

        *If this fails:* check both tables against the regions; no library can be trusted with this.
        """
        peer.register(NBYTES, seed=1)
        here = transport.register(self.memory(2)).regions[0]
        other = transport.connect(peer.describe())
        inside, there = BlockTable.over(here, BLOCK), other.regions[0]
        for remote in (
            BlockTable.over(there, BLOCK, count=COUNT + 1),
            BlockTable((there.address - 1,), BLOCK, BLOCK, COUNT),
            BlockTable((there.address + (1 << 40),), BLOCK, BLOCK, 1),
        ):
            with pytest.raises(MemoryInvalid):
                transport.prepare(other, inside, remote)
        with pytest.raises(MemoryInvalid):
            transport.prepare(other, BlockTable.over(here, BLOCK, count=COUNT + 1), BlockTable.over(there, BLOCK))

    def test_memory_that_was_deregistered_is_refused(self, pair: Any) -> None:
        """A route outlives the registration that it was prepared for, and is refused then.

        *If this fails:* compare the state of the registrations before each transfer, not only at `prepare`.
        """
        transport, _, route, _ = pair
        registration = next(row for row in transport._registrations)  # what `route_to` registered
        registration.close()
        registration.close()
        with pytest.raises(MemoryInvalid):
            transport.read(route, [0], [0])

    def test_damaged_descriptions_are_refused_whatever_the_bytes(self, transport: Transport, peer: PeerProcess) -> None:
        """Cut, flipped, extended, random: each is a typed error, and the true one still works.

        *If this fails:* nothing of a description may reach the library before all of it is checked.
        """
        peer.register(BLOCK)
        true, rng = peer.describe(), random.Random(8)
        for attempt in range(300):
            data = bytearray(true)
            if attempt % 3 == 0:
                del data[rng.randrange(len(data)) :]
            elif attempt % 3 == 1:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            else:
                data = bytearray(rng.randbytes(rng.randrange(400)))
            with pytest.raises(DescriptionInvalid):
                transport.connect(bytes(data), deadline=5)
        assert peer.describe() == true
        transport.connect(true)

    def test_its_own_description_is_refused(self, transport: Transport) -> None:
        """An endpoint does not connect to itself.

        *If this fails:* compare incarnations.
        """
        with pytest.raises(DescriptionInvalid):
            transport.connect(transport.describe())

    # -- loss

    def test_a_killed_peer_is_lost_within_the_deadline(self, pair: Any) -> None:
        """Reads, writes and notifications fail with `PeerLost` that names the peer, and nothing hangs.

        *If this fails:* find out how the fabric tells that a process is gone, or keep a connection that tells.
        """
        transport, peer, route, _ = pair
        transport.read(route, [0], [0]).wait()
        peer.signal(signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises((PeerLost, DeadlineExceeded), match=route.peer.name):
            transport.read(route, range(COUNT), range(COUNT), deadline=3).wait()
        with pytest.raises(TensorwayError):
            eventually(lambda: transport.notify(route.peer, b"x", deadline=3), PATIENCE)
        assert time.monotonic() - started < 6 + SLACK

    def test_a_stopped_peer_costs_a_deadline_and_no_more(self, pair: Any) -> None:
        """A transfer with a peer that does not run is done, or fails at its deadline; later ones work again.

        *If this fails:* no call of the library may be waited for without a deadline.
        """
        transport, peer, route, _ = pair
        transport.read(route, [0], [0]).wait()
        peer.signal(signal.SIGSTOP)
        try:
            started = time.monotonic()
            transfer = transport.read(route, range(COUNT), range(COUNT), deadline=1)
            eventually(lambda: not transfer.pending, 1 + SLACK)
            assert time.monotonic() - started < 1 + SLACK
            assert transfer.error is None or route.peer.name in str(transfer.error)
        finally:
            peer.signal(signal.SIGCONT)
        assert peer.ask("ping") == peer.pid

    def test_a_restarted_peer_is_another_incarnation(self, transport: Transport) -> None:
        """Whoever comes back under the same name replaces who was there; old routes fail, new ones work.

        *If this fails:* put an incarnation into the description, and compare it.
        """
        mine, routes, peers = self.memory(2), [], []
        options = self.options | {"name": "engine-1"}
        try:
            for seed in (1, 5):
                peers.append(PeerProcess(self.name, options, shared_memory=self.shared_memory))
                peers[-1].register(NBYTES, seed=seed)
                routes.append(route_to(transport, transport.connect(peers[-1].describe()), mine))
                transport.read(routes[-1], range(COUNT), range(COUNT)).wait()
                assert digest(content(seed, NBYTES)) == digest(mine)
            assert routes[0].peer.name == routes[1].peer.name
            with pytest.raises(PeerLost, match="replaced"):
                transport.read(routes[0], [0], [0]).wait()
            transport.read(routes[1], [0], [0]).wait()
        finally:
            for peer in peers:
                peer.close()

    def test_a_cancelled_transfer_is_quarantined_until_nothing_writes_any_more(self, pair: Any) -> None:
        """After `released` is true, its memory stays as it is.

        *If this fails:* say released only when the fabric itself has let go, not when somebody stopped waiting.
        """
        transport, _, route, mine = pair
        transfer = transport.read(route, range(COUNT), range(COUNT))
        transfer.cancel()
        if transfer.state is State.FAILED:
            with pytest.raises(TransferCancelled):
                transfer.wait()
        eventually(lambda: transfer.released, PATIENCE)
        mine[:] = bytes(NBYTES)
        time.sleep(0.2)
        assert bytes(NBYTES) == mine

    # -- objects, threads, processes

    def test_it_closes_twice_and_says_so_when_it_is_used_after_that(self, pair: Any) -> None:
        """Closing is final and harmless; what is called after it raises `Closed`.

        *If this fails:* keep a flag, and look at it first.
        """
        transport, _, route, _ = pair
        transport.close()
        transport.close()
        for call in (transport.describe, transport.notifications, lambda: transport.read(route, [0], [0])):
            with pytest.raises(Closed):
                call()

    def test_four_threads_share_one_endpoint(self, pair: Any) -> None:
        """Each reads blocks of its own, a hundred times; every byte is right and nothing raises.

        *If this fails:* the library may not be safe between threads: put a lock around it.
        """
        transport, _, route, mine = pair
        errors: list[BaseException] = []

        def work(part: int) -> None:
            ids = range(part * COUNT // 4, (part + 1) * COUNT // 4)
            try:
                for _ in range(100):
                    transport.read(route, ids, ids).wait()
            except BaseException as error:  # it goes to the test's thread
                errors.append(error)

        threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [] == errors
        assert digest(content(1, NBYTES)) == digest(mine)

    def test_transfers_can_be_awaited(self, pair: Any) -> None:
        """Ten at once in an event loop; failures are raised where they are awaited.

        *If this fails:* return the contract's `Transfer`, which can be awaited.
        """
        transport, _, route, mine = pair

        async def run() -> None:
            ids = [range(part, COUNT, 10) for part in range(10)]
            await asyncio.gather(*(_awaited(transport.read(route, some, some)) for some in ids))

        asyncio.run(run())
        assert digest(content(1, NBYTES)) == digest(mine)

    def test_a_forked_child_is_refused_and_the_parent_goes_on(self, pair: Any) -> None:
        """The child of a fork must not touch its parent's endpoint: libraries abort, and sockets are shared.

        *If this fails:* compare the process's number before every call.
        """
        transport, _, route, _ = pair
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of just what this tests
            child = os.fork()
        if child == 0:
            code = 1
            try:
                transport.describe()
            except Closed:
                code = 0
            finally:
                os._exit(code)
        assert 0 == os.waitpid(child, 0)[1]
        transport.read(route, [0], [0]).wait()

    def test_many_transfers_and_connections_leave_nothing_behind(self, pair: Any) -> None:
        """Files and threads are as many after a thousand transfers and thirty connections as before.

        *If this fails:* count what `connect` opens, and close it in `disconnect`.
        """
        transport, peer, route, _ = pair

        def used(times: int) -> None:
            for _ in range(times):
                for _ in range(33):
                    transport.read(route, [0, 5], [1, 2]).wait()
                transport.disconnect(transport.connect(peer.describe()))

        used(3)  # the first of each may open what stays: a connection, the thread that minds the pending
        # That thread starts when a transfer is pending, which any may be.
        assert [] == left_of(lambda: used(30), PATIENCE, more_threads=1)

    def test_an_idle_endpoint_leaves_the_processor_alone(self, pair: Any) -> None:
        """A second of nothing costs less than a twentieth of one.

        *If this fails:* a thread spins. Let it sleep on what wakes it.
        """
        transport, _, route, _ = pair
        transport.read(route, [0], [0]).wait()
        used = []
        for _ in range(3):  # something of before may end in one of them; what spins does in each
            started = time.process_time()
            time.sleep(1)
            used.append(time.process_time() - started)
            if used[-1] < 0.05:
                return
        pytest.fail(f"seconds of a processor, each of one: {used}")

    def test_statistics_count_what_was_moved_and_what_failed(self, pair: Any) -> None:
        """Bytes by direction, transfers, and failures by cause, per peer.

        *If this fails:* count where a transfer ends, whoever waited for it.
        """
        transport, peer, route, _ = pair
        transport.read(route, range(10), range(10)).wait()
        peer.signal(signal.SIGKILL)
        with pytest.raises(TensorwayError):
            transport.read(route, range(COUNT), range(COUNT), deadline=3).wait()
        # A transfer is counted when it is released, which may be a while after it failed.
        name = route.peer.name
        eventually(lambda: any(key.startswith("failed_") for key in transport.statistics().get(name, ())), PATIENCE)
        counts = transport.statistics()[name]
        assert (1, 10 * BLOCK) == (counts["transfers"], counts["read_bytes"])
        assert 1 == sum(value for key, value in counts.items() if key.startswith("failed_"))


def route_to(transport: Transport, peer: Peer, mine: object) -> Route:
    """A route over all of `mine` and all of the peer's first region."""
    here = transport.register(mine).regions[0]
    return transport.prepare(peer, BlockTable.over(here, BLOCK), BlockTable.over(peer.regions[0], BLOCK))


async def _awaited(transfer: Any) -> None:
    await transfer
