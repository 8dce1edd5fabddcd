"""What members say to each other, played through: any order of events that connections allow, without sockets."""

from __future__ import annotations

from array import array
from collections import Counter, deque

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorway.eplb import Drained, Failed, Fetch, Filled, PeerFailed, Send, Served
from tensorway_nccl import protocol
from tensorway_nccl.lanes import Piece
from tensorway_nccl.messages import Accept, Ask, Done, Go, Item, Propose, Ready, Void
from tensorway_nccl.protocol import Broken, Conductor

MIB = 1 << 20


class World:
    """Members whose messages travel when a test says so, and whose rounds are over when both have started them."""

    def __init__(self, count):
        self.now = 0.0
        self.members = [
            Conductor(me, [peer for peer in range(count) if peer != me], lambda: self.now) for me in range(count)
        ]
        self.wires = {(a, b): deque() for a in range(count) for b in range(count) if a != b}
        #: Of each member and its peer, the rounds that it has on a stream.
        self.running = {}
        self.told = [[] for _ in range(count)]
        self.most = 0
        self.silent = set()

    def collect(self):
        for me, member in enumerate(self.members):
            while member.outbox:
                peer, message = member.outbox.popleft()
                self.wires[me, peer].append(message)
            while member.starts:
                peer, items = member.starts.popleft()
                assert (me, peer) not in self.running, "two rounds of a pair at once"
                self.running[me, peer] = member.pieces(peer, items)
                self.most = max(self.most, sum(key[0] == me for key in self.running))
            self.told[me] += member.events
            member.events.clear()

    def choices(self):
        """What can happen next."""
        found = [("deliver", *pair) for pair, wire in self.wires.items() if wire and pair[1] not in self.silent]
        for me, peer in self.running:
            if (me, peer) < (peer, me) and (peer, me) in self.running:
                found.append(("over", me, peer))
        return found

    def do(self, what, a, b):
        if what == "deliver":
            self.members[b].hear(a, self.wires[a, b].popleft())
        else:
            (here_out, here_in), (there_out, there_in) = self.running.pop((a, b)), self.running.pop((b, a))
            assert (here_out, here_in) == (there_in, there_out), "the two would not put the same on their streams"
            assert 0 < len(here_out) + len(here_in) <= protocol.ROUND
            self.members[a].over(b)
            self.collect()
            self.members[b].over(a)
        self.collect()

    def run(self, choose=lambda choices: choices[0]):
        self.collect()
        while choices := self.choices():
            self.do(*choose(choices))


def pieces(name, count, nbytes=MIB):
    """Both ends have pieces of the same lengths; here also the same addresses, so that a test can compare them."""
    return [Piece(hash((name, index)), nbytes) for index in range(count)]


def pair_of(src, dst, layer, turn, slots=1):
    numbers = array("i", range(slots))
    return Fetch(layer, src, numbers, numbers, 0), Send(layer, dst, numbers, 0), (0, layer, turn)


@st.composite
def plans(draw):
    members = draw(st.integers(2, 5))
    moves = draw(
        st.lists(
            st.tuples(
                st.integers(0, members - 1), st.integers(0, members - 1), st.integers(0, 2), st.integers(1, 90)
            ).filter(lambda move: move[0] != move[1]),
            max_size=14,
        )
    )
    return members, moves


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans(), rng=st.randoms(use_true_random=False), cancels=st.sets(st.integers(0, 13), max_size=5))
def test_everything_arrives_once_whatever_the_order(plan, rng, cancels):
    count, moves = plan
    world, turns, todo, fetches, sends = World(count), Counter(), [], [], []
    for number, (src, dst, layer, size) in enumerate(moves):
        fetch, send, key = pair_of(src, dst, layer, turns[src, dst, layer])
        turns[src, dst, layer] += 1
        fetches.append(fetch)
        sends.append(send)
        parts = pieces(number, size, 3 * MIB)
        todo.append(lambda dst=dst, fetch=fetch, key=key, parts=parts: world.members[dst].post(fetch, key, parts))
        todo.append(lambda src=src, send=send, key=key, parts=parts: world.members[src].serve(send, key, parts))
    rng.shuffle(todo)
    gone = [(number, moves[number][1]) for number in cancels if number < len(moves)]
    while todo or world.choices():
        steps = [*(["todo"] if todo else []), *world.choices()]
        step = rng.choice(steps)
        if step == "todo":
            todo.pop()()
            world.collect()
        else:
            world.do(*step)
        if gone and rng.random() < 0.1:
            number, dst = gone.pop()
            world.members[dst].cancel(fetches[number], "too late")
            world.members[dst].cancel(fetches[number], "too late")
            world.collect()
    world.run(rng.choice)

    assert world.most <= protocol.PLACES
    for number, (src, dst, _, _) in enumerate(moves):
        ends = [event for event in world.told[dst] if getattr(event, "fetch", None) is fetches[number]]
        if number not in cancels:
            assert ends == [Filled(fetches[number])]
        elif ends != [Filled(fetches[number])]:
            failed, *drained = ends
            assert isinstance(failed, Failed)
            assert drained == ([] if failed.released else [Drained(fetches[number])])
        assert [Served(sends[number])] == [
            event for event in world.told[src] if getattr(event, "send", None) is sends[number]
        ]
    for member in world.members:
        assert protocol.PLACES == member._places
        for link in member._links.values():
            assert ("idle", {}, {}, {}, []) == (link.state, link.fetches, link.sends, link.asked, list(link.ready))


@settings(max_examples=200, deadline=None)
@given(plan=plans(), rng=st.randoms(use_true_random=False), victim=st.integers(0, 4), after=st.integers(0, 60))
def test_a_lost_member_ends_its_own_moves_and_no_others(plan, rng, victim, after):
    count, moves = plan
    world, turns, fetches, sends = World(count), Counter(), [], []
    for number, (src, dst, layer, size) in enumerate(moves):
        fetch, send, key = pair_of(src, dst, layer, turns[src, dst, layer])
        turns[src, dst, layer] += 1
        fetches.append(fetch)
        sends.append(send)
        world.members[dst].post(fetch, key, pieces(number, size, 3 * MIB))
        world.members[src].serve(send, key, pieces(number, size, 3 * MIB))
        world.collect()
    for _ in range(after):
        if choices := world.choices():
            world.do(*rng.choice(choices))
    victim %= count
    for me, member in enumerate(world.members):
        if me != victim:
            world.wires[victim, me].clear()
            world.wires[me, victim].clear()
            member.lose(victim, "it was killed")
            member.lose(victim, "it was killed")
            world.collect()
            assert [victim] * ((me, victim) in world.running) == list(member.stops)
            if world.running.pop((me, victim), None):
                member.over(victim, "it was stopped")
                world.collect()
            world.running.pop((victim, me), None)
    world.silent = {victim}
    world.run(rng.choice)

    for number, (src, dst, _, _) in enumerate(moves):
        ends = [event for event in world.told[dst] if getattr(event, "fetch", None) is fetches[number]]
        if victim not in (src, dst):
            assert ends == [Filled(fetches[number])]
            assert Served(sends[number]) in world.told[src]
        elif victim == src and ends != [Filled(fetches[number])]:
            failed, *drained = ends
            assert isinstance(failed, Failed)
            assert drained == ([] if failed.released else [Drained(fetches[number])])
    for me, member in enumerate(world.members):
        if me != victim:
            assert [PeerFailed(victim, "it was killed")] == [e for e in world.told[me] if isinstance(e, PeerFailed)]
            assert protocol.PLACES == member._places


# -- one by one


def begun(slots=1, **given):
    """Two members with one move from 0 to 1, which is ready."""
    world = World(2)
    fetch, send, key = pair_of(0, 1, 0, 0, slots)
    world.members[1].post(fetch, key, pieces("row", **{"count": 3, **given}))
    world.members[0].serve(send, key, pieces("row", **{"count": 3, **given}))
    world.collect()
    return world, fetch, send, key


def test_nothing_is_started_before_both_have_said_so():
    world, fetch, send, key = begun()

    said = []
    while choices := [choice for choice in world.choices() if choice[0] == "deliver"]:
        said.append(world.wires[choices[0][1:]][0])
        assert not world.running or isinstance(said[-1], Go)
        world.do(*choices[0])
    item = Item(True, key, 0, 3)
    assert [Ask(key, 1), Propose((item,)), Accept((item,)), Go((item,))] == said
    world.run()
    assert ([Served(send)], [Filled(fetch)]) == (world.told[0], world.told[1])


def test_rounds_are_bounded_by_bytes_and_by_pieces_and_have_at_least_one():
    for count, nbytes, rounds in ((200, 1, 4), (10, 16 * MIB, 3), (2, 100 * MIB, 2)):
        world, fetch, _, _ = begun(count=count, nbytes=nbytes)
        seen = []
        while choices := world.choices():
            if choices[0][0] == "over":
                seen.append(sum(piece.nbytes for piece in world.running[0, 1][0]))
            world.do(*choices[0])
        assert rounds == len(seen), seen
        assert all(total <= protocol.ROUND_BYTES or total == nbytes for total in seen)
        assert [Filled(fetch)] == world.told[1]


def test_what_is_given_up_before_its_round_is_released_and_after_it_drained():
    world, fetch, send, _ = begun()
    world.members[1].cancel(fetch, "too late")
    world.run()
    assert ([Served(send)], [Failed(fetch, "too late", True)]) == (world.told[0], world.told[1])

    world, fetch, send, _ = begun()
    while (1, 0) not in world.running:
        world.do(*world.choices()[0])
    world.members[1].cancel(fetch, "too late")
    world.run()
    assert ([Served(send)], [Failed(fetch, "too late", False), Drained(fetch)]) == (world.told[0], world.told[1])


def test_a_silent_member_keeps_no_place_of_those_that_propose():
    world = World(3 + protocol.PLACES)
    silent = range(2, 2 + protocol.PLACES)
    for peer in (*silent, 1):
        fetch, send, key = pair_of(0, peer, 0, 0)
        world.members[peer].post(fetch, key, pieces(peer, 1))
        world.members[0].serve(send, key, pieces(peer, 1))
        world.collect()
        while wire := world.wires[peer, 0]:
            world.members[0].hear(peer, wire.popleft())
            world.collect()
    world.silent = set(silent)
    world.run()
    assert [] == world.told[1], "all places are taken"

    world.now += protocol.ANSWER
    world.members[0].tick()
    world.run()
    assert 1 == len(world.told[1])

    world.silent = set()
    world.run()
    assert all(1 == len(world.told[peer]) for peer in silent)


def test_a_send_of_other_slots_is_refused_at_once():
    world = World(2)
    fetch, _, key = pair_of(1, 0, 4, 0, slots=2)
    _, send, _ = pair_of(1, 0, 4, 0, slots=3)
    world.members[0].post(fetch, key, pieces("row", 2))
    world.members[1].serve(send, key, pieces("row", 3))
    world.run()

    why = "it wants 2 slots of layer 4, and 3 were served"
    assert ([Failed(fetch, why, True)], [Served(send)]) == (world.told[0], world.told[1])


def test_rows_that_the_device_keeps_are_never_drained():
    world, fetch, _, _ = begun()
    while (1, 0) not in world.running:
        world.do(*world.choices()[0])
    world.members[1].over(0, "it is stuck", released=False)
    world.collect()

    assert [PeerFailed(0, "it is stuck"), Failed(fetch, "it is stuck", False)] == world.told[1]


def test_what_was_on_a_stream_with_a_lost_member_fails_when_it_is_off_it():
    for given_up in (False, True):
        world, fetch, _, _ = begun()
        while (1, 0) not in world.running:
            world.do(*world.choices()[0])
        if given_up:
            world.members[1].cancel(fetch, "too late")
        world.members[1].lose(0, "it was killed")
        world.collect()
        assert [0] == list(world.members[1].stops)
        assert [Failed(fetch, "too late", False)] * given_up + [PeerFailed(0, "it was killed")] == world.told[1]
        world.members[1].over(0, "it was stopped")
        world.collect()
        end = Drained(fetch) if given_up else Failed(fetch, "it was killed", True)
        assert end == world.told[1][-1]


def test_what_never_leaves_the_device_fails_without_its_rows():
    world, fetch, _, _ = begun()
    while (1, 0) not in world.running:
        world.do(*world.choices()[0])
    world.members[1].leave("closed")
    world.members[1].abandon()
    world.collect()
    assert [Failed(fetch, "closed", False)] == world.told[1]


def test_leaving_ends_all_and_blames_nobody():
    world, fetch, _, _ = begun()
    world.members[1].leave("closed")
    world.collect()
    assert [Failed(fetch, "closed", True)] == world.told[1]


@pytest.mark.parametrize(
    "message",
    [
        Accept(()),
        Done(),
        Go((Item(True, (0, 0, 0), 0, 1),)),
        Propose((Item(True, (0, 0, 0), 1, 2),)),
        Propose((Item(True, (0, 0, 0), 0, 4),)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_who_says_what_cannot_be_is_not_listened_to(message):
    member = Conductor(1, [0])
    fetch, _, key = pair_of(0, 1, 0, 0)
    member.post(fetch, key, pieces("row", 3))

    with pytest.raises(Broken):
        member.hear(0, message)


def test_what_is_said_of_moves_that_have_ended_is_no_news():
    member = Conductor(1, [0])
    member.hear(0, Ready((0, 0, 0)))
    member.hear(0, Void((0, 0, 1)))
    member.hear(0, Propose((Item(False, (0, 0, 0), 0, 1),)))
    assert [(0, Accept(()))] == list(member.outbox)
    member.hear(0, Go(()))
    assert not member.events and not member.starts
