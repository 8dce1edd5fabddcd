"""The suite of tiers: correct ones pass, and each way of being wrong is seen."""

from __future__ import annotations

import hashlib
import inspect
import time
from pathlib import Path

import pytest

from tensorway.errors import Closed, Unsupported
from tensorway.offload import OfTenant, TierCapabilities, key_tenant
from tensorway.testing import TierSuite, offload_tiers
from tensorway.testing.offload_reading import sources
from tensorway.types import ProbeResult


class Files:
    """A file per block, with the digest of its key and bytes in front."""

    capabilities = TierCapabilities(persistent=True, shared=True)
    limit = 1 << 30

    def __init__(self, folder, context):
        self.folder = Path(folder) / context.fingerprint.hex()
        self.folder.mkdir(exist_ok=True)
        self.closed = False

    def path(self, key):
        return self.folder / hashlib.sha256(key).hexdigest()

    def open(self):
        if self.closed:
            raise Closed("A tier was used.", "It is closed.", "Open another one.")

    def probe(self, deadline):
        return ProbeResult.failed("it is closed") if self.closed else ProbeResult.passed("files")

    def contains(self, keys, deadline):
        self.open()
        return [self.path(key).exists() for key in keys]

    def put(self, items, deadline):
        self.open()
        until = time.monotonic() + deadline
        return ["late" if time.monotonic() > until else self.put_one(key, view) for key, view in items]

    def put_one(self, key, view):
        if len(list(self.folder.iterdir())) >= self.limit and not self.path(key).exists():
            return "full"
        scratch = self.folder / f".{time.monotonic_ns()}{id(view)}"
        scratch.write_bytes(key_tenant(key) + self.digest(key, view) + bytes(view))
        scratch.rename(self.path(key))
        return "done"

    @staticmethod
    def digest(key, view):
        return hashlib.sha256(key + bytes(view)).digest()

    def get(self, items, deadline):
        self.open()
        until = time.monotonic() + deadline
        return ["late" if time.monotonic() > until else self.get_one(key, view) for key, view in items]

    def get_one(self, key, view):
        try:
            data = self.path(key).read_bytes()
        except FileNotFoundError:
            return "missing"
        if len(data) != 40 + len(view) or data[:40] != key_tenant(key) + self.digest(key, data[40:]):
            self.path(key).unlink(missing_ok=True)
            return "corrupt"
        view[:] = data[40:]
        return "done"

    def delete(self, which, deadline):
        self.open()
        paths = {self.path(key) for key in which} if not isinstance(which, OfTenant) else self.of(which.tenant)
        count = 0
        for path in paths:
            try:
                path.unlink()
                count += 1
            except FileNotFoundError:
                pass
        return count

    def of(self, tenant):
        return [path for path in self.folder.iterdir() if path.read_bytes()[:8] == tenant]

    def stats(self):
        return []

    def close(self, deadline=5.0):
        self.closed = True


class TestFiles(TierSuite):
    @classmethod
    def make(cls, folder, context):
        return Files(folder, context)


class Small(Files):
    limit = 20


class TestSmall(TierSuite):
    too_many = 60

    def fill(self, tier, keys):
        tier.limit += len(keys)
        super().fill(tier, keys)

    @classmethod
    def make(cls, folder, context):
        return Small(folder, context)


class ReadOnly(Files):
    """Somebody else fills it."""

    capabilities = TierCapabilities(writable=False, deletes=False)

    def put(self, items, deadline):
        self.open()
        raise Unsupported("Blocks were to be stored.", "Others do that here.", "Ask it only.")

    def delete(self, which, deadline):
        raise Unsupported("Blocks were to be deleted.", "Others do that here.", "Ask it only.")


class TestReadOnly(TierSuite):
    def fill(self, tier, keys):
        for each in sources(keys):
            tier.put_one(*each)

    @classmethod
    def make(cls, folder, context):
        return ReadOnly(folder, context)


# -- and what is wrong


class NoCapabilities(Files):
    capabilities = {"persistent": True}


class SaysNo(Files):
    def probe(self, deadline):
        return ProbeResult.failed("not today")


class SilentlyReadOnly(Files):
    capabilities = TierCapabilities(writable=False, deletes=False)


class Flips(Files):
    def get_one(self, key, view):
        outcome = Files.get_one(self, key, view)
        view[-1] ^= 1
        return outcome


class WritesBeside(Files):
    def get_one(self, key, view):
        outcome = Files.get_one(self, key, view)
        view.obj[0] = 0
        return outcome


class StopsAtMissing(Files):
    def get(self, items, deadline):
        found = Files.get(self, items, deadline)
        return found[: found.index("missing") + 1] if "missing" in found else found


class Imagines(Files):
    def contains(self, keys, deadline):
        return [True] * len(keys)


class AnyLength(Files):
    def get_one(self, key, view):
        if not self.path(key).exists():
            return "missing"
        data = self.path(key).read_bytes()[40:]
        view[: len(data)] = data[: len(view)] if len(data) >= len(view) else data
        return "done"


class ByKey(Files):
    """Buffers of one key are one."""

    def get(self, items, deadline):
        done = {key: self.get_one(key, view) for key, view in dict(items).items()}
        return [done[key] for key, _ in items]


class CountsTwice(Files):
    def delete(self, which, deadline):
        found = len(which) if not isinstance(which, OfTenant) and self.contains(which, 1)[0:1] == [True] else 0
        return max(found, Files.delete(self, which, deadline))


class RaisesForNothing(Files):
    def get(self, items, deadline):
        assert items[0]
        return Files.get(self, items, deadline)


class RefusesAgain(Files):
    def put_one(self, key, view):
        return "failed" if self.path(key).exists() else Files.put_one(self, key, view)


class ShortNames(Files):
    def path(self, key):
        return self.folder / key[:4].hex()


class Lengthless(Files):
    """The group is no part of the name."""

    def path(self, key):
        return self.folder / hashlib.sha256(key[:-4]).hexdigest()


class FewAtOnce(Files):
    def put(self, items, deadline):
        return [*Files.put(self, items[:100], deadline), *["failed"] * (len(items) - 100)]


class NoTenants(Files):
    def path(self, key):
        return self.folder / hashlib.sha256(key[:-12] + key[-4:]).hexdigest()


class DeletesAll(Files):
    def of(self, tenant):
        return [*self.folder.iterdir()]


class AnyFingerprint(Files):
    def __init__(self, folder, context):
        Files.__init__(self, folder, context)
        self.folder = Path(folder)


class NotAtOnce(Files):
    """A place that two threads meet in."""

    def get_one(self, key, view):
        self.at = key
        time.sleep(0.0001)
        try:
            data = self.path(self.at).read_bytes()[40:]
        except FileNotFoundError:  # another thread has deleted it, and that is not what is broken here
            return "missing"
        if len(data) != len(view):
            return "missing"
        view[:] = data
        return "done"


class Partly(Files):
    """A block is seen before it is whole."""

    def put_one(self, key, view):
        with self.path(key).open("wb") as file:
            file.write(key_tenant(key))
            file.flush()
            time.sleep(0.001)
            file.write(self.digest(key, view) + bytes(view))
        return "done"


class RaisesLate(Files):
    def get(self, items, deadline):
        found = Files.get(self, items, deadline)
        if "late" in found:
            raise TimeoutError
        return found


class Hangs(Files):
    def contains(self, keys, deadline):
        if deadline < 1:
            time.sleep(3)
        return Files.contains(self, keys, deadline)


class Lies(Files):
    """It says that it is done, though it was late."""

    def put(self, items, deadline):
        return ["done" for _ in Files.put(self, items, deadline)]


class LiesOfGet(Files):
    def get(self, items, deadline):
        return ["done" for _ in Files.get(self, items, deadline)]


class WritesLater(Files):
    def get(self, items, deadline):
        found = Files.get(self, items, deadline)
        if "late" in found:
            import threading

            threading.Thread(target=self.go_on, args=(items[0][1],), daemon=True).start()
        return found

    @staticmethod
    def go_on(buffer):
        for _ in range(50):  # so long that it is seen on a busy machine, too
            time.sleep(0.02)
            buffer[0] = (buffer[0] + 1) % 256


class OpenForEver(Files):
    def open(self):
        pass


class UsableForEver(Files):
    def probe(self, deadline):
        return ProbeResult.passed("always")


class ClosesOnce(Files):
    def close(self, deadline=5.0):
        self.open()
        self.closed = True


class Full(Small):
    """What did not fit is there nevertheless, in part."""

    def put_one(self, key, view):
        outcome = Files.put_one(self, key, view)
        if outcome == "full":
            self.path(key).write_bytes(b"half of it")
        return outcome


class Believes(Files):
    def get_one(self, key, view):
        try:
            data = self.path(key).read_bytes()[40:]
        except FileNotFoundError:
            return "missing"
        if len(data) != len(view):
            return "corrupt"
        view[:] = data
        return "done"


class NeverHeals(Files):
    def get_one(self, key, view):
        before = self.path(key).read_bytes() if self.path(key).exists() else b""
        outcome = Files.get_one(self, key, view)
        if outcome == "corrupt":
            self.path(key).write_bytes(before)
        return outcome

    def put_one(self, key, view):
        return "done" if self.path(key).exists() else Files.put_one(self, key, view)


class ForgetsAtTheEnd(Files):
    def close(self, deadline=5.0):
        if not self.closed:
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
        self.closed = True


class Alone(Files):
    """It remembers what it has stored itself, and looks at nothing else."""

    def __init__(self, folder, context):
        Files.__init__(self, folder, context)
        self.own = set()

    def put_one(self, key, view):
        self.own.add(key)
        return Files.put_one(self, key, view)

    def contains(self, keys, deadline):
        return [key in self.own and self.path(key).exists() for key in keys]


class OwnWords(Files):
    def stats(self):
        from tensorway.metrics import Sample

        return [Sample("files_of_mine", (), 1.0)]


DEADLINE = "test_a_call_ends_whatever_its_deadline_is"
#: What is broken, a test that sees it, and what that says.
BREAKS = [
    (NoCapabilities, "test_it_can_be_used_and_says_what_it_can", "assert"),
    (SaysNo, "test_it_can_be_used_and_says_what_it_can", "not today"),
    (SilentlyReadOnly, "test_what_is_not_declared_is_refused", "Unsupported"),
    (Flips, "test_every_byte_comes_back_and_none_beside_it_is_written", "bytes of .* are wrong"),
    (WritesBeside, "test_every_byte_comes_back_and_none_beside_it_is_written", "beside the buffer"),
    (Lengthless, "test_every_byte_comes_back_and_none_beside_it_is_written", "assert"),
    (StopsAtMissing, "test_what_is_not_there_is_missing_and_the_others_come", "assert"),
    (Imagines, "test_what_is_not_there_is_missing_and_the_others_come", "assert"),
    (AnyLength, "test_a_buffer_of_another_length_is_never_filled", "bytes of 4096"),
    (ByKey, "test_what_is_twice_in_a_list_is_there_twice", "are wrong"),
    (CountsTwice, "test_what_is_twice_in_a_list_is_there_twice", "assert 3 == 6"),
    (RaisesForNothing, "test_nothing_asked_is_nothing_answered", "index out of range"),
    (RefusesAgain, "test_what_is_stored_again_is_there_still", "assert"),
    (ShortNames, "test_a_key_may_be_any_bytes", "assert"),
    (FewAtOnce, "test_many_blocks_are_one_call", "room for a few blocks"),
    (NoTenants, "test_tenants_have_blocks_of_their_own", "assert"),
    (DeletesAll, "test_tenants_have_blocks_of_their_own", "assert 4 == 12"),
    (AnyFingerprint, "test_another_fingerprint_is_another_store", "assert"),
    (NotAtOnce, "test_threads_share_it", "are wrong"),
    (Partly, "test_threads_share_it", "corrupt"),
    (RaisesLate, DEADLINE, "get raised"),
    (Hangs, DEADLINE, "contains goes on"),
    (Lies, DEADLINE, "what was said to be done is not there"),
    (LiesOfGet, DEADLINE, "are wrong"),
    (WritesLater, DEADLINE, "after the call"),
    (OpenForEver, "test_who_is_closed_refuses", "Closed"),
    (UsableForEver, "test_who_is_closed_refuses", "its probe says"),
    (ClosesOnce, "test_who_is_closed_refuses", "It is closed"),
    (Full, "test_there_is_an_end_to_its_room", "assert"),
    (Files, "test_there_is_an_end_to_its_room", "60 of 60"),
    (Believes, "test_damage_is_seen", "are wrong"),
    (NeverHeals, "test_damage_is_seen", "not healed"),
    (ForgetsAtTheEnd, "test_what_is_persistent_outlives_its_process", "assert"),
    (Alone, "test_what_is_shared_is_seen_by_others_that_are_open", "never sees it"),
    (OwnWords, "test_statistics_are_values_of_the_vocabulary", "files_of_mine"),
]


class Any(TierSuite):
    """Not collected: its tests are called here. The tier that it makes is named in the folder."""

    too_many = 60

    @classmethod
    def make(cls, folder, context):
        return globals()[(Path(folder).parent / "which").read_text()](folder, context)


@pytest.mark.parametrize(("broken", "test", "says"), BREAKS)
def test_it_is_said(broken, test, says, tmp_path, monkeypatch):
    monkeypatch.setattr(offload_tiers, "PATIENCE", 0.5)
    (tmp_path / "which").write_text(broken.__name__)
    (folder := tmp_path / "blocks").mkdir()
    if "room" not in test:
        monkeypatch.setattr(Any, "too_many", 0)
    suite = Any()
    opening = inspect.unwrap(TierSuite.open_tier)(suite, folder)
    given = {"open_tier": next(opening), "tmp_path": folder, "deadline": 0.0}
    function = getattr(suite, test)
    wanted = inspect.signature(function).parameters
    if "tier" in wanted:
        given["tier"] = given["open_tier"]()
    with pytest.raises((AssertionError, IndexError, Closed), match=says):
        function(**{name: given[name] for name in wanted})


def test_every_test_of_the_suite_is_seen_to_fail():
    tests = {name for name in dir(TierSuite) if name.startswith("test_")}
    assert tests - {test for _, test, _ in BREAKS} == {"test_no_test_of_the_suite_is_replaced_without_a_reason"}
