"""What every tier must do: each byte or a word for why not, from many threads, by its deadline, for each tenant alone.

Room `testing`. Subclass `TierSuite`, set `name` (and `options` or `options_in`), install your dist; or give `make`.
What is declared is the gate: who is not `writable` must refuse `put`, who has no `deletes` must refuse `delete`.
"""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import attrs
import pytest

import tensorway
from tensorway.offload import (
    OUTCOMES,
    OffloadKey,
    OfTenant,
    Tier,
    TierCapabilities,
    TierContext,
    make_offload_key,
    tenant_of_salt,
)
from tensorway.testing.offload_ground import chain, refusal, together, unknown_values
from tensorway.testing.offload_reading import NBYTES, Outcomes, Reading, damage, sources, within
from tensorway.testing.ranks import Rank, RankProcess, located
from tensorway.testing.suite import Suite
from tensorway.testing.waiting import eventually
from tensorway.types import ProbeResult

#: For what is not about deadlines.
LONG: Final = 60.0
#: What a call may take beyond a deadline that has passed when it begins, on a machine that is busy with other things.
PATIENCE: Final = 30.0
_FINGERPRINT: Final = bytes(range(32))

Open = Callable[..., Tier]


class TierSuite(Suite):
    """The contract of `tensorway.offload.Tier`."""

    #: The backend's name, as `tensorway.create("offload_tier", name)` takes it.
    name: str
    options: ClassVar[dict[str, object]] = {}
    #: So many blocks of 4,096 bytes are more than these options have room for; 0 if nobody could say.
    too_many: ClassVar[int] = 0

    @classmethod
    def options_in(cls, folder: Path) -> dict[str, object]:
        """The options of one test, whose folder it is. Tiers of equal options are to be one store, if they can be."""
        return dict(cls.options)

    @classmethod
    def make(cls, folder: Path, context: TierContext) -> Tier:
        """A tier; override it for one that is not installed. Another process calls it, too, by your class's name."""
        tier: Any = tensorway.create("offload_tier", cls.name, cls.options_in(folder), context)
        assert tier is not None
        return tier  # type: ignore[no-any-return]

    def fill(self, tier: Tier, keys: Sequence[OffloadKey]) -> None:
        """Let the tier have these blocks; override it for one that cannot be written to."""
        assert ["done"] * len(keys) == list(tier.put(sources(keys), LONG)), "room for a few blocks there must be"

    @pytest.fixture
    def open_tier(self, tmp_path: Path) -> Iterator[Open]:
        """Open a tier in this test's folder; all are closed at its end."""
        opened: list[Tier] = []

        def make(**fields: Any) -> Tier:
            context = attrs.evolve(TierContext("suite", _FINGERPRINT, NBYTES, {"model": "suite"}), **fields)
            opened.append(self.make(tmp_path, context))
            return opened[-1]

        yield make
        for each in opened:
            each.close()

    @pytest.fixture
    def tier(self, open_tier: Open) -> Tier:
        """One tier."""
        return open_tier()

    # -- what it is

    def test_it_can_be_used_and_says_what_it_can(self, tier: Tier) -> None:
        """Capabilities are `TierCapabilities`; the probe of a tier that was just opened says yes.

        *If this fails:* set `capabilities`; let `probe` do what a call would need, within its deadline.
        """
        found: object = tier.capabilities
        assert isinstance(found, TierCapabilities), found
        assert min(tier.capabilities.calls, tier.capabilities.alignment) >= 1, found
        probed = tier.probe(LONG)
        assert isinstance(probed, ProbeResult), probed
        assert probed.usable, probed

    def test_what_is_not_declared_is_refused(self, tier: Tier) -> None:
        """`put` of a tier that is not `writable`, and `delete` of one without `deletes`, raise `Unsupported`.

        *If this fails:* declare it, or raise `Unsupported`.
        """
        keys = chain("refused", 2)
        if not tier.capabilities.writable:
            assert "Unsupported" == refusal(lambda: tier.put(sources(keys), LONG))
        if not tier.capabilities.deletes:
            assert "Unsupported" == refusal(lambda: tier.delete(keys, LONG))
            assert "Unsupported" == refusal(lambda: tier.delete(OfTenant(tenant_of_salt("")), LONG))
        if tier.capabilities.writable and tier.capabilities.deletes:
            assert 0 == tier.delete(keys, LONG)

    # -- bytes

    def test_every_byte_comes_back_and_none_beside_it_is_written(self, tier: Tier) -> None:
        """Blocks of several lengths, into buffers at odd addresses with something before and behind them.

        *If this fails:* write from the first to the last byte of the view that was given; no rounding.
        """
        keys = [key for group in range(len(NBYTES)) for key in chain("bytes", 5, group=group)]
        self.fill(tier, keys)
        reading = Reading(keys)
        assert ["done"] * len(keys) == list(tier.get(reading.items, LONG))
        assert "" == reading.wrong(["done"] * len(keys))

    def test_what_is_not_there_is_missing_and_the_others_come(self, tier: Tier) -> None:
        """Outcomes are co-indexed with what was asked, and so is `contains`.

        *If this fails:* answer for each item in its place; one that is missing must not end the call.
        """
        here, elsewhere = chain("here", 6), chain("elsewhere", 7)
        assert [False] * 6 == list(tier.contains(here, LONG))
        assert ["missing"] * 6 == list(tier.get(Reading(here).items, LONG))
        self.fill(tier, here)
        mixed = [key for pair in zip(elsewhere, here, strict=False) for key in pair] + elsewhere[6:]
        reading = Reading(mixed)
        outcomes = tier.get(reading.items, LONG)
        assert ["done" if key in here else "missing" for key in mixed] == list(outcomes)
        assert "" == reading.wrong(outcomes)
        assert [key in here for key in mixed] == list(tier.contains(mixed, LONG))

    def test_a_buffer_of_another_length_is_never_filled(self, tier: Tier) -> None:
        """Longer or shorter than what was stored: not `done`; and what is there afterwards is right, or is gone.

        *If this fails:* compare the stored length with the buffer's before anything is called `done`.
        """
        keys = chain("length", 4)
        self.fill(tier, keys)
        for key, nbytes in zip(keys, (1, NBYTES[0] - 1, NBYTES[0] + 1, 3 * NBYTES[0]), strict=True):
            reading = Reading([key], [nbytes])
            assert ["corrupt"] == list(tier.get(reading.items, LONG)), f"{nbytes} bytes of {NBYTES[0]}"
            assert "" == reading.wrong(["corrupt"])
            reading = Reading([key])
            outcomes = tier.get(reading.items, LONG)
            assert outcomes[0] in ("done", "missing")
            assert "" == reading.wrong(outcomes)

    def test_what_is_twice_in_a_list_is_there_twice(self, tier: Tier) -> None:
        """Each buffer is filled; deleted, it counts once.

        *If this fails:* keep buffers by their place in the list, not by key.
        """
        keys = chain("twice", 3)
        if tier.capabilities.writable:
            assert ["done"] * 6 == list(tier.put(sources([*keys, *keys]), LONG))
        else:
            self.fill(tier, keys)
        reading = Reading([*keys, *keys[::-1]])
        assert ["done"] * 6 == list(tier.get(reading.items, LONG))
        assert "" == reading.wrong(["done"] * 6)
        assert [True] * 6 == list(tier.contains([*keys, *keys], LONG))
        if tier.capabilities.deletes:
            assert 3 == tier.delete([*keys, *keys], LONG)

    def test_nothing_asked_is_nothing_answered(self, tier: Tier) -> None:
        """Empty lists.

        *If this fails:* leave early if there is nothing to do.
        """
        assert [] == list(tier.contains([], LONG))
        assert [] == list(tier.get([], LONG))
        if tier.capabilities.writable:
            assert [] == list(tier.put([], LONG))
        if tier.capabilities.deletes:
            assert 0 == tier.delete([], LONG)

    def test_what_is_stored_again_is_there_still(self, tier: Tier) -> None:
        """Equal bytes under a key that is there: `done`, whether they are written again or not.

        *If this fails:* answer `done` for what is there already.
        """
        if not tier.capabilities.writable:
            pytest.skip("it is not writable")
        keys = chain("again", 4)
        for _ in range(3):
            assert ["done"] * 4 == list(tier.put(sources(keys), LONG))
        if tier.capabilities.deletes:
            assert 2 == tier.delete(keys[:2], LONG)
            assert ["done"] * 4 == list(tier.put(sources(keys), LONG))
        reading = Reading(keys)
        assert ["done"] * 4 == list(tier.get(reading.items, LONG))
        assert "" == reading.wrong(["done"] * 4)

    def test_a_key_may_be_any_bytes(self, tier: Tier) -> None:
        """Hashes of 4 to 64 bytes with zeros, slashes, dots, line ends; one that begins another; all groups.

        *If this fails:* write keys out in hexadecimal, and never cut them to one length.
        """
        hashes = [
            b"\0" * 4,
            b"\xff" * 64,
            b"../../..",
            b"a/b\n",
            b"a/b\n\0",
            b"a/b\n" * 16,
            b"%s%s",
            b"\0" * 32,
            b".tmp",
        ]
        keys = [make_offload_key(each, group, salt) for each in hashes for group in (0, 2) for salt in ("", "../")]
        self.fill(tier, keys)
        reading = Reading(keys)
        assert ["done"] * len(keys) == list(tier.get(reading.items, LONG))
        assert "" == reading.wrong(["done"] * len(keys))

    def test_many_blocks_are_one_call(self, tier: Tier) -> None:
        """A thousand, far more than it may do at once.

        *If this fails:* take a long call apart by yourself, and answer for all of it.
        """
        if self.too_many:
            pytest.skip("its options leave room for fewer")
        keys = chain("many", 1000, group=1)
        self.fill(tier, keys)
        reading = Reading(keys)
        assert ["done"] * len(keys) == list(tier.get(reading.items, LONG))
        assert "" == reading.wrong(["done"] * len(keys))

    # -- who it belongs to

    def test_tenants_have_blocks_of_their_own(self, tier: Tier) -> None:
        """Equal hashes of other salts are other blocks; all of one tenant can be deleted, and no other goes with them.

        *If this fails:* use the whole key; it has the tenant in it.
        """
        own, other, nobodys = (chain("shared", 4, salt=salt) for salt in ("one", "two", ""))
        self.fill(tier, own)
        assert [False] * 8 == list(tier.contains([*other, *nobodys], LONG))
        self.fill(tier, [*other, *nobodys])
        if tier.capabilities.deletes:
            assert 4 == tier.delete(OfTenant(tenant_of_salt("one")), LONG)
            assert 0 == tier.delete(OfTenant(tenant_of_salt("one")), LONG)
            assert [False] * 4 == list(tier.contains(own, LONG))
            assert 1 == tier.delete([*own, other[0]], LONG)
            other = other[1:]
        reading = Reading([*other, *nobodys])
        expected = ["done"] * len(reading.items)
        assert expected == list(tier.get(reading.items, LONG))
        assert "" == reading.wrong(expected)

    def test_another_fingerprint_is_another_store(self, tier: Tier, open_tier: Open) -> None:
        """Blocks of other weights or layouts are not there, and nothing of theirs is deleted.

        *If this fails:* keep each fingerprint apart, and check it where a block is read.
        """
        keys = chain("fingerprint", 4)
        self.fill(tier, keys)
        stranger = open_tier(fingerprint=_FINGERPRINT[::-1])
        assert [False] * 4 == list(stranger.contains(keys, LONG))
        assert ["missing"] * 4 == list(stranger.get(Reading(keys).items, LONG))
        if stranger.capabilities.deletes:
            assert 0 == stranger.delete(keys, LONG)
            assert 0 == stranger.delete(OfTenant(tenant_of_salt("")), LONG)
        assert [True] * 4 == list(tier.contains(keys, LONG))

    # -- several at once

    def test_threads_share_it(self, tier: Tier) -> None:
        """Eight store, read, look up and delete the same blocks at once: never a byte of another block.

        *If this fails:* a block is seen when it is whole; what is read is checked after it was read.
        """
        keys = [key for group in (0, 2, 3) for key in chain("threads", 6, group=group)]
        self.fill(tier, keys)

        def work(number: int) -> None:
            rng = random.Random(number)
            for _ in range(25):
                some = rng.sample(keys, rng.randrange(1, 9))
                match rng.randrange(4):
                    case 0 if tier.capabilities.writable:
                        # What another thread deletes at this moment may fail, and go well the next time.
                        assert set(tier.put(sources(some), LONG)) <= {"done", "full", "failed"}
                    case 1 if tier.capabilities.deletes and number % 4 == 0:
                        assert 0 <= tier.delete(some[:2], LONG) <= 2
                    case 2:
                        assert len(some) == len(tier.contains(some, LONG))
                    case _:
                        reading = Reading(some)
                        outcomes = tier.get(reading.items, LONG)
                        assert set(outcomes) <= {"done", "missing"}, outcomes
                        assert "" == reading.wrong(outcomes)

        together(8, work)
        self.fill(tier, keys)

    @pytest.mark.parametrize("deadline", [0.0, 1e-6, 0.003, -1.0])
    def test_a_call_ends_whatever_its_deadline_is(self, tier: Tier, deadline: float) -> None:
        """One that has passed, or is about to: an answer for each block, true where it says `done`, and no more bytes.

        *If this fails:* look at the clock between blocks; answer `late` for what was not done.
        """
        keys = chain("late", 40, group=3)
        self.fill(tier, keys)
        fresh, reading, others = chain("late too", 40, group=3), Reading(keys), chain("nowhere", 40)
        calls: dict[str, Callable[[], Any]] = {
            "get": lambda: tier.get(reading.items, deadline),
            "contains": lambda: tier.contains([*keys, *others], deadline),
            "probe": lambda: tier.probe(deadline),
        }
        if tier.capabilities.writable:
            calls["put"] = lambda: tier.put(sources(fresh), deadline)
        answers = {what: within(PATIENCE, call, what) for what, call in calls.items()}
        after = [bytes(each) for each in reading.buffers]
        assert len(keys) == len(answers["get"]) and set(answers["get"]) <= {"done", "late", "failed"}, answers["get"]
        assert "" == reading.wrong(answers["get"])
        assert not any(answers["contains"][40:]), "it has what nobody has stored"
        assert isinstance(answers["probe"], ProbeResult)
        if tier.capabilities.writable:
            assert len(fresh) == len(answers["put"]) and set(answers["put"]) <= {*OUTCOMES} - {"missing", "corrupt"}
            again = Reading(fresh)
            outcomes = tier.get(again.items, LONG)
            assert set(outcomes) <= {"done", "missing"}
            assert "" == again.wrong(outcomes)
            said = [key for key, what in zip(fresh, answers["put"], strict=True) if what == "done"]
            assert all(tier.contains(said, LONG)), "what was said to be done is not there"
        time.sleep(0.1)
        assert after == [bytes(each) for each in reading.buffers], "a buffer was written to after the call"

    # -- what goes wrong

    def test_who_is_closed_refuses(self, open_tier: Open) -> None:
        """Closed twice; afterwards calls raise `Closed`, and a probe does so or says no.

        *If this fails:* remember that it is closed, and say so before anything else.
        """
        tier, keys = open_tier(), chain("closed", 2)
        self.fill(tier, keys)
        reading = Reading(keys)
        tier.close()
        tier.close(0.0)
        assert "Closed" == refusal(lambda: tier.get(reading.items, LONG))
        assert "Closed" == refusal(lambda: tier.contains(keys, LONG))
        if tier.capabilities.writable:
            assert "Closed" == refusal(lambda: tier.put(sources(keys), LONG))
        if tier.capabilities.deletes:
            assert "Closed" == refusal(lambda: tier.delete(keys, LONG))
        usable = refusal(lambda: tier.probe(LONG)) != "Closed" and tier.probe(LONG).usable
        assert not usable, "its probe says that it can be used"
        assert "" == reading.wrong(["missing"] * 2)

    def test_there_is_an_end_to_its_room(self, open_tier: Open) -> None:
        """Far more blocks than fit: `full`, or older ones go; what is there is right, and it can be used afterwards.

        *If this fails:* answer `full`, or evict; a store that does not fit must leave nothing behind.
        """
        if not self.too_many:
            pytest.skip("its options do not say how much is too much")
        tier = open_tier()
        keys = chain("room", self.too_many)
        outcomes = [each for at in range(0, len(keys), 16) for each in tier.put(sources(keys[at : at + 16]), LONG)]
        assert set(outcomes) <= {"done", "full"}, set(outcomes)
        there = tier.contains(keys, LONG)
        assert any(there) and not all(there), f"{sum(there)} of {len(keys)} blocks are there"
        for at in range(0, len(keys), 64):
            reading = Reading(keys[at : at + 64])
            found = tier.get(reading.items, LONG)
            assert set(found) <= {"done", "missing"}
            assert "" == reading.wrong(found)
        if tier.capabilities.deletes:
            assert sum(there) == tier.delete(OfTenant(tenant_of_salt("")), LONG)
            self.fill(tier, keys[:2])

    def test_damage_is_seen(self, open_tier: Open, tmp_path: Path) -> None:
        """Every file below the test's folder is damaged: no wrong byte, and what is stored again can be read again.

        *If this fails:* keep a checksum of key and bytes with each block, and compare it where the block is read.
        """
        tier, keys = open_tier(), [key for group in (0, 2, 3) for key in chain("damage", 8, group=group)]
        if not tier.capabilities.persistent:
            pytest.skip("it keeps nothing in files")
        self.fill(tier, keys)
        tier.close()
        if not damage(tmp_path):
            pytest.skip("there are no files below the folder of the test")
        tier, reading = open_tier(), Reading(keys)
        outcomes = tier.get(reading.items, LONG)
        assert set(outcomes) <= {"done", "missing", "corrupt"}, set(outcomes)
        assert "" == reading.wrong(outcomes)
        if tier.capabilities.writable:
            self.fill(tier, keys)
            reading = Reading(keys)
            assert ["done"] * len(keys) == list(tier.get(reading.items, LONG)), "what was damaged is not healed"
            assert "" == reading.wrong(["done"] * len(keys))

    # -- who else sees it

    def test_what_is_persistent_outlives_its_process(self, open_tier: Open, tmp_path: Path) -> None:
        """`persistent`: stored by a process that has ended, it is here; stored here and closed, a new process has it.

        *If this fails:* write what is needed to find blocks again before `put` says `done`, or in `close`.
        """
        tier = open_tier()
        if not tier.capabilities.persistent:
            pytest.skip("needs the capability persistent")
        ours, theirs = chain("ours", 5), chain("theirs", 5)
        self.fill(tier, ours)
        tier.close()
        assert ["done"] * 5 == self._elsewhere(tmp_path, ours, theirs)
        tier, reading = open_tier(), Reading([*ours, *theirs])
        assert ["done"] * 10 == list(tier.get(reading.items, LONG))
        assert "" == reading.wrong(["done"] * 10)

    def test_what_is_shared_is_seen_by_others_that_are_open(self, open_tier: Open) -> None:
        """`shared`: another engine's tier of the same options has a block soon after it was stored; deleted, it goes.

        *If this fails:* look again at what others have stored, where a lookup finds nothing.
        """
        one = open_tier(engine="one")
        if not one.capabilities.shared or not one.capabilities.writable:
            pytest.skip("needs the capabilities shared and writable")
        other, keys = open_tier(engine="other"), chain("shared", 5)
        assert [False] * 5 == list(other.contains(keys, LONG))
        self.fill(one, keys)
        eventually(lambda: all(other.contains(keys, LONG)), PATIENCE, "the other tier never sees it")
        reading = Reading(keys)
        assert ["done"] * 5 == list(other.get(reading.items, LONG))
        assert "" == reading.wrong(["done"] * 5)
        if one.capabilities.deletes:
            assert 5 == one.delete(keys, LONG)
            eventually(lambda: {"missing"} == {*other.get(Reading(keys).items, LONG)}, PATIENCE, "it is read for ever")
            eventually(lambda: not any(other.contains(keys, LONG)), PATIENCE, "the other tier has it for ever")

    def test_statistics_are_values_of_the_vocabulary(self, tier: Tier) -> None:
        """Names and labels are those of `tensorway.offload.METRICS`.

        *If this fails:* count with `tensorway.metrics.Counters` over `METRICS`.
        """
        keys = chain("statistics", 3)
        self.fill(tier, keys)
        tier.get(Reading(keys).items, LONG)
        assert [] == unknown_values(tier.stats())

    def _elsewhere(self, folder: Path, reads: Sequence[OffloadKey], stores: Sequence[OffloadKey]) -> Outcomes:
        """What another process says of blocks that it reads; it stores others."""
        cls = type(self)
        where = (cls.__module__, inspect.getfile(cls), cls.__qualname__)
        process = RankProcess("")
        try:
            found: Outcomes = process.call(use_elsewhere, where, str(folder), list(reads), list(stores))
            return found
        finally:
            process.close()


def use_elsewhere(
    rank: Rank, where: tuple[str, str, str], folder: str, reads: list[OffloadKey], stores: list[OffloadKey]
) -> list[str]:
    """In another process: open the tier, read and compare, store, close."""
    suite: Any = located(*where)
    context = TierContext("elsewhere", _FINGERPRINT, NBYTES, {"model": "suite"})
    tier: Tier = suite.make(Path(folder), context)
    reading = Reading(reads)
    outcomes: list[str] = list(tier.get(reading.items, LONG))
    outcomes += [wrong] if (wrong := reading.wrong(outcomes)) else []
    suite().fill(tier, stores)
    tier.close()
    return outcomes
