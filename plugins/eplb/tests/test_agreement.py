"""The agreement in all orders of messages, deaths and suspicions: survivors never differ, and always come to an end."""

from __future__ import annotations

import random

import pytest

from tensorway_eplb.agreement import Agreement, Decision, Status

LAYERS = (3, 5, 8)


class World:
    """Members whose messages are delivered late, in order, or never."""

    def __init__(self, rng: random.Random, members: int) -> None:
        self.rng = rng
        self.needs = {layer: rng.choice([None, *range(members)]) for layer in LAYERS}
        self.members = [Agreement(members, me, LAYERS, self.survivable) for me in range(members)]
        self.queues = {(a, b): [] for a in range(members) for b in range(members) if a != b}
        self.dead: set[int] = set()
        self.decided: list[dict[int, bool]] = [{} for _ in range(members)]
        self.was_ready: dict[int, set[int]] = {layer: set() for layer in LAYERS}

    def survivable(self, layer: int, lost: frozenset[int]) -> bool:
        return self.needs[layer] not in lost

    def running(self) -> list[int]:
        return [m for m, each in enumerate(self.members) if m not in self.dead and each.excluded_by is None]

    def tell(self, member: int) -> None:
        each = self.members[member]
        for other in set(range(len(self.members))) - {member}:  # also who is lost: it may not know
            self.queues[member, other].append((tuple(each.view), bytes(each.statuses)))

    def deliver(self, sender: int, receiver: int) -> None:
        queue = self.queues[sender, receiver]
        if queue:
            message = queue.pop(0)
            if receiver not in self.dead:
                self.members[receiver].hear(sender, *message)
                self.note(receiver)

    def note(self, member: int) -> None:
        for decision in self.members[member].decisions():
            assert decision.layer not in self.decided[member], "decided twice"
            self.decided[member][decision.layer] = decision.commit
            if decision.commit:
                missing = self.members[member].alive - self.was_ready[decision.layer]
                assert not missing, f"{member} committed {decision.layer} without {missing}"

    def step(self) -> None:
        rng, running = self.rng, self.running()
        if not running:
            return
        member = rng.choice(running)
        each = self.members[member]
        match rng.choices(
            ["ready", "give up", "tell", "deliver", "lose mail", "kill", "suspect"], [6, 1, 6, 12, 1, 1, 1]
        )[0]:
            case "ready":
                layer = rng.choice(LAYERS)
                if each.status(layer) is Status.WORKING:
                    self.was_ready[layer].add(member)
                each.ready(layer)
            case "give up":
                each.give_up(rng.choice(LAYERS), "test")
            case "tell":
                self.tell(member)
            case "deliver":
                self.deliver(*rng.choice(list(self.queues)))
            case "lose mail":
                queue = self.queues[rng.choice(list(self.queues))]
                del queue[rng.randrange(len(queue) + 1) :]
            case "kill" if len(self.dead) < len(self.members) - 1:
                self.dead.add(member)
            case "suspect":
                each.lose(rng.randrange(len(self.members)))
        self.note(member)

    def settle(self) -> None:
        """Everybody finishes its work, notices who is silent, and tells all until nothing changes."""
        for _ in range(12):
            running = self.running()
            for member in running:
                for layer in LAYERS:
                    if self.members[member].status(layer) is Status.WORKING:
                        self.was_ready[layer].add(member)
                    self.members[member].ready(layer)
                for gone in set(range(len(self.members))) - set(running):
                    self.members[member].lose(gone)
                self.note(member)
                self.tell(member)
            for pair in self.queues:
                while self.queues[pair]:
                    self.deliver(*pair)


@pytest.mark.parametrize("members", [2, 3, 4, 5])
def test_survivors_never_differ_and_always_come_to_an_end(members):
    first = random.randrange(1 << 30)
    print(f"seeds from {first}")
    for seed in range(first, first + 1500):
        world = World(random.Random(seed), members)
        for _ in range(world.rng.randrange(10, 80)):
            world.step()
        world.settle()
        survivors = world.running()
        for member in survivors:
            assert set(world.decided[member]) == set(LAYERS), f"seed {seed}: {member} is undecided"
            # Who is alive for a survivor is a survivor, and is of the same view.
            assert world.members[member].alive <= set(survivors), f"seed {seed}"
            for other in world.members[member].alive:
                assert world.decided[member] == world.decided[other], f"seed {seed}: {member} and {other} differ"


def test_without_a_loss_a_layer_commits_when_the_last_is_ready():
    world = World(random.Random(0), 3)
    for member in (0, 1):
        world.members[member].ready(5)
        world.was_ready[5].add(member)
        world.tell(member)
    world.deliver(1, 0)
    assert {} == world.decided[0] and {2} == world.members[0].waiting_for()
    world.was_ready[5].add(2)
    world.members[2].ready(5)
    world.tell(2)
    world.deliver(2, 0)
    assert {5: True} == world.decided[0]


def test_who_had_committed_before_a_loss_is_followed():
    def survivable(layer, lost):
        return not lost

    first, second = Agreement(3, 0, LAYERS, survivable), Agreement(3, 1, LAYERS, survivable)
    for each in (first, second):
        each.ready(3)
    first.hear(1, (), bytes([1, 0, 0]))
    first.hear(2, (), bytes([1, 0, 0]))
    assert [Decision(3, True)] == first.decisions()
    # The second never heard the third, and without it would have to abort.
    second.lose(2)
    first.lose(2)
    second.hear(0, (2,), bytes(first.statuses))
    assert [Decision(3, True)] == second.decisions()


def test_in_a_new_view_everybody_is_asked_anew():
    each = Agreement(3, 0, LAYERS, lambda layer, lost: True)
    each.ready(3)
    each.hear(1, (), bytes([1, 0, 0]))
    each.lose(2)
    assert [] == each.decisions()
    each.hear(1, (2,), bytes([1, 0, 0]))
    assert [Decision(3, True)] == each.decisions()


def test_a_member_that_others_hold_for_lost_learns_it_and_commits_nothing_more():
    each = Agreement(3, 0, LAYERS, lambda layer, lost: True)
    each.ready(3)
    each.hear(1, (0,), bytes([2, 2, 2]))
    assert 1 == each.excluded_by and [] == each.decisions()
    each.abandon("excluded")
    assert {3: False, 5: False, 8: False} == {made.layer: made.commit for made in each.decisions()}


def test_an_old_report_takes_nothing_back():
    each = Agreement(2, 0, LAYERS, lambda layer, lost: True)
    each.hear(1, (), bytes([1, 1, 0]))
    each.hear(1, (), bytes([1, 0, 0]))
    each.ready(5)
    assert [Decision(5, True)] == each.decisions()


def test_what_no_member_can_say_is_not_heard():
    each = Agreement(2, 0, LAYERS, lambda layer, lost: True)
    each.ready(3)
    for member, view, statuses in [(1, (), b"1"), (7, (), bytes([1, 1, 1])), (0, (), bytes([3, 3, 3]))]:
        each.hear(member, view, statuses)
    assert [] == each.decisions() and frozenset() == each.view
