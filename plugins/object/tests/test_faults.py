"""A store that is slow, overloaded, damaged or gone, and answers that are not what was stored."""

from __future__ import annotations

import itertools
import logging
import threading
import time

import pytest

from tensorway import _logging
from tensorway.errors import BackendUnavailable, Closed, DeadlineExceeded, TransferFailed, Unsupported
from tensorway.metrics import total
from tensorway.offload import OfTenant, key_tenant, make_offload_key
from tensorway_object.frames import HEADER
from tensorway_object.options import ObjectOptions
from tensorway_object.stores import store_of
from tensorway_object.testing.proxy import Fault
from tensorway_object.testing.servers import ask, options_at

NBYTES = 4096
#: For what is not about deadlines.
LONG = 60.0


def keys_of(count, what="block", salt=""):
    return [make_offload_key(f"{what} {number}".ljust(32).encode(), salt=salt) for number in range(count)]


def content(key, nbytes=NBYTES):
    return (key * (nbytes // len(key) + 1))[:nbytes]


def items(keys, nbytes=NBYTES):
    return [(key, memoryview(content(key, nbytes))) for key in keys]


def store(tier, keys):
    assert ["done"] * len(keys) == tier.put(items(keys), LONG)


def read(tier, keys, deadline=LONG, nbytes=NBYTES):
    """Outcomes; and that no buffer holds what it should not."""
    buffers = [bytearray(b"\xa5" * nbytes) for _ in keys]
    outcomes = tier.get([(key, memoryview(buffer)) for key, buffer in zip(keys, buffers, strict=True)], deadline)
    for key, buffer, outcome in zip(keys, buffers, outcomes, strict=True):
        assert buffer == (content(key, nbytes) if outcome == "done" else b"\xa5" * nbytes)
    return outcomes


def raw(s3, bucket):
    """The bucket, without a tier."""
    return store_of(ObjectOptions(**options_at(s3.port, f"s3://{bucket}")))


def first(count, fault, method="GET"):
    """The first so many requests of a method have a fault."""
    numbers = itertools.count()
    return lambda asked, _path: fault if asked == method and next(numbers) < count else None


def always(fault, method):
    return lambda asked, _path: fault if asked == method else None


SLOW_DOWN = Fault("status", 503, "<Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>")


# -- what goes away


@pytest.mark.parametrize("fault", [SLOW_DOWN, Fault("status", 500), Fault("drop"), Fault("cut", 100), Fault("lose")])
def test_a_fault_that_goes_away_is_not_seen_but_counted(tier_at, between, fault):
    tier, keys = tier_at(between.port), keys_of(3)
    store(tier, keys)
    between.fault = first(2, fault)
    before = total(tier.stats(), "offload_retries_total")

    assert ["done"] * 3 == read(tier, keys)
    assert 2 == total(tier.stats(), "offload_retries_total", medium="object") - before


@pytest.mark.parametrize("fault", [SLOW_DOWN, Fault("status", 500), Fault("drop"), Fault("lose")])
def test_a_store_that_was_interrupted_is_made_again(tier_at, between, fault):
    tier, keys = tier_at(between.port), keys_of(3)
    between.fault = first(2, fault, "PUT")

    assert ["done"] * 3 == tier.put(items(keys), LONG)
    assert ["done"] * 3 == read(tier, keys)


def test_bytes_that_change_on_their_way_are_read_again_and_nothing_is_removed(tier_at, between):
    tier, keys = tier_at(between.port), keys_of(2)
    store(tier, keys)
    between.fault = first(1, Fault("corrupt", HEADER + 17))

    assert ["done"] * 2 == read(tier, keys)
    assert "DELETE" not in {method for method, _ in between.seen}


# -- what stays


def test_throttling_that_does_not_end_fails_and_others_are_served_afterwards(tier_at, between):
    tier, keys = tier_at(between.port, attempts=3), keys_of(2)
    store(tier, keys)
    between.seen.clear()
    between.fault = always(SLOW_DOWN, "GET")

    assert ["failed"] * 2 == read(tier, keys)
    assert 3 * 2 == len(between.seen)

    between.fault = lambda method, path: None
    assert ["done"] * 2 == read(tier, keys)


def test_a_store_that_is_down_is_not_asked_for_ever_more(tier_at, between):
    tier, keys = tier_at(between.port, attempts=100, pause=0.001, retry_ratio=0.0), keys_of(50)
    between.seen.clear()
    between.fault = always(Fault("status", 503), "GET")

    assert {"failed"} == set(read(tier, keys))
    assert len(between.seen) <= 50 + 20, "each request was made again, although all have failed"


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_what_hangs_is_late_and_no_buffer_is_written_to_afterwards(tier_at, between, method):
    tier, keys = tier_at(between.port), keys_of(4)
    store(tier, keys)
    between.fault = always(Fault("hang"), method)
    fresh, buffers = keys_of(4, "fresh"), [bytearray(NBYTES) for _ in keys]
    begun = time.monotonic()
    if method == "GET":
        outcomes = tier.get([(key, memoryview(each)) for key, each in zip(keys, buffers, strict=True)], 0.2)
    else:
        outcomes = tier.put(items(fresh), 0.2)

    assert ["late"] * 4 == outcomes
    assert time.monotonic() - begun < 30.0
    between.over.set()  # now it answers
    time.sleep(0.1)
    assert [bytearray(NBYTES)] * 4 == buffers


def test_one_that_hangs_keeps_no_other_from_being_read(tier_at, between):
    tier, keys = tier_at(between.port), keys_of(6)
    store(tier, keys)
    between.fault = first(1, Fault("hang"))

    outcomes = read(tier, keys, 3.0)

    assert ["done"] * 5 + ["late"] == sorted(outcomes)


def test_a_request_that_hangs_is_made_again_within_the_deadline(tier_at, between):
    tier, keys = tier_at(between.port, request_timeout=0.3), keys_of(1)
    store(tier, keys)
    between.fault = first(1, Fault("hang"))

    assert ["done"] == read(tier, keys)


def test_looking_takes_no_longer_than_it_may_and_what_is_unknown_is_not_there(tier_at, between):
    tier, keys = tier_at(between.port), keys_of(2)
    store(tier, keys)
    between.fault = always(Fault("hang"), "HEAD")

    assert [False] * 2 == tier.contains(keys, 0.1)
    with pytest.raises(DeadlineExceeded, match=r"\(0 are gone\)"):
        tier.delete(keys, 0.1)


def test_looking_that_fails_for_all_says_so_and_for_some_only_that_they_are_not_there(tier_at, between):
    tier, keys = tier_at(between.port, attempts=1), keys_of(3)
    store(tier, keys)
    between.fault = first(1, Fault("status", 500), "HEAD")
    assert [False, True, True] == sorted(tier.contains(keys, LONG))

    between.fault = always(Fault("status", 500), "HEAD")
    with pytest.raises(TransferFailed, match="did not answer as it should"):
        tier.contains(keys, LONG)


def test_what_is_forbidden_fails_at_once_and_is_said_once(tier_at, between, caplog):
    tier, keys = tier_at(between.port), keys_of(3)
    store(tier, keys)
    between.seen.clear()
    denied = Fault("status", 403, "<Error><Code>AccessDenied</Code></Error>")
    between.fault = lambda method, path: denied
    _logging.forget()

    with caplog.at_level(logging.WARNING, "tensorway.object"):
        assert ["failed"] * 3 == read(tier, keys)
        assert ["failed"] * 3 == tier.put(items(keys_of(3, "others")), LONG)

    assert 6 == len(between.seen), "what is forbidden was asked for again"
    (line,) = caplog.messages
    assert "does not let us do that" in line and "right to list" in line


def test_a_bucket_that_goes_away_is_told_from_blocks_that_do(s3, tier_at, between, bucket):
    tier, keys = tier_at(between.port), keys_of(2)
    gone = Fault("status", 404, "<Error><Code>NoSuchBucket</Code></Error>")
    assert ["missing"] * 2 == read(tier, keys)
    between.fault = lambda method, path: gone

    assert ["failed"] * 2 == read(tier, keys)
    assert ["failed"] * 2 == tier.put(items(keys), LONG)
    result = tier.probe(LONG)
    assert not result.usable and result.reason.startswith("The bucket is not there")
    assert "Create the bucket" in result.remedy

    between.fault = lambda method, path: None
    assert tier.probe(LONG).usable


def test_a_store_without_room_is_full(tier_at, between):
    tier = tier_at(between.port)
    full = Fault("status", 507, "<Error><Code>XMinioStorageFull</Code></Error>")
    between.fault = always(full, "PUT")

    assert ["full"] * 2 == tier.put(items(keys_of(2)), LONG)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("status", 403), "does not let us"),
        (Fault("status", 404, "<Error><Code>NoSuchBucket</Code></Error>"), "bucket is not there"),
        (Fault("status", 400), "does not take such a request"),
        (Fault("status", 500), "did not answer as it should"),
        (Fault("drop"), "did not answer as it should"),
    ],
)
def test_opening_says_what_is_wrong_with_the_bucket(tier_at, between, fault, says):
    between.fault = lambda method, path: fault

    with pytest.raises(BackendUnavailable, match=says):
        tier_at(between.port)


def test_opening_ends_by_its_deadline(open_tier, between, bucket):
    between.fault = lambda method, path: Fault("hang")

    with pytest.raises(DeadlineExceeded, match=r"0\.2 s"):
        open_tier(options_at(between.port, f"s3://{bucket}"), deadline=0.2)


# -- what is not what was stored


@pytest.mark.parametrize(
    "fault", [Fault("corrupt", 3), Fault("corrupt", HEADER), Fault("long", 1), Fault("long", NBYTES)]
)
def test_what_is_damaged_in_the_store_is_removed_and_can_be_stored_again(tier_at, between, fault):
    tier, keys = tier_at(between.port), keys_of(2)
    store(tier, keys)
    between.fault = always(fault, "GET")
    assert ["corrupt"] * 2 == read(tier, keys)

    between.fault = lambda method, path: None
    assert ["missing"] * 2 == read(tier, keys)
    store(tier, keys)
    assert ["done"] * 2 == read(tier, keys)


def test_what_cannot_be_removed_counts_as_not_there_and_is_written_over(tier_at, between):
    tier, keys = tier_at(between.port), keys_of(2)
    store(tier, keys)
    denied = Fault("status", 403)
    faults = {"GET": Fault("corrupt", HEADER + 1), "POST": denied, "DELETE": denied}
    between.fault = lambda method, path: faults.get(method)
    assert ["corrupt"] * 2 == read(tier, keys)
    assert [False] * 2 == tier.contains(keys, LONG)

    between.fault = lambda method, path: None
    between.seen.clear()
    store(tier, keys)
    assert ["PUT", "PUT"] == [method for method, _ in between.seen]
    assert [True] * 2 == tier.contains(keys, LONG)
    assert ["done"] * 2 == read(tier, keys)


def test_an_answer_without_end_is_read_no_further_than_the_block(tier_at, between):
    tier, keys = tier_at(between.port), keys_of(1)
    store(tier, keys)
    between.sent = 0
    between.fault = always(Fault("endless"), "GET")

    assert ["corrupt"] == read(tier, keys)
    time.sleep(0.1)
    assert between.sent < 64 << 20, "it was read on and on"


@pytest.mark.parametrize("nbytes", [0, 1, HEADER, HEADER + NBYTES - 1, HEADER + NBYTES + 1, 1 << 20])
def test_what_somebody_else_has_written_there_is_no_block(s3, tier_at, bucket, nbytes):
    tier, (key, other) = tier_at(s3.port), keys_of(2)
    store(tier, [key])
    (name,) = [name for name in s3.names(bucket) if not name.endswith("manifest.json")]
    raw(s3, bucket).put(name, bytes(nbytes))

    assert ["corrupt", "missing"] == read(tier, [key, other])


def test_a_block_under_another_s_name_is_not_taken_for_it(s3, tier_at, bucket):
    tier, (key, other) = tier_at(s3.port), keys_of(2)
    store(tier, [key])
    (name,) = [name for name in s3.names(bucket) if not name.endswith("manifest.json")]
    store(tier, [other])
    theirs = next(each for each in s3.names(bucket) if each != name and not each.endswith("manifest.json"))
    store_at = raw(s3, bucket)
    store_at.put(theirs, store_at.get(name).bytes())

    assert ["done", "corrupt"] == read(tier, [key, other])


# -- several engines


def test_who_comes_second_does_not_write_again(s3, tier_at, between):
    one, other, keys = tier_at(s3.port), tier_at(between.port), keys_of(3)
    store(one, keys)

    store(other, keys)

    assert [412] * 4 == [status for method, status in between.answered if method == "PUT"], (
        "the manifest, and each block"
    )
    assert ["done"] * 3 == read(other, keys)


def test_a_store_that_knows_no_conditions_is_written_to_without(tier_at, between):
    def refuse(method, path):
        return (
            Fault("status", 501, "<Error><Code>NotImplemented</Code></Error>")
            if method == "PUT" and next(n) < 1
            else None
        )

    tier, keys = tier_at(between.port), keys_of(2)
    n = itertools.count()
    between.fault = refuse

    assert ["done"] * 2 == tier.put(items(keys), LONG)
    assert ["done"] * 2 == read(tier, keys)


def test_many_engines_share_a_bucket(s3, tier_at):
    tiers, keys = [tier_at(s3.port) for _ in range(6)], keys_of(12)
    troubles = []

    def work(tier, number):
        try:
            some = keys[number:] + keys[:number]
            assert ["done"] * 12 == tier.put(items(some), LONG)
            assert ["done"] * 12 == read(tier, some)
        except BaseException as error:
            troubles.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(tiers, range(6), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == troubles


# -- tenants, and what cannot be written


def test_a_tenant_is_listed_and_removed_by_its_prefix_however_many_blocks_it_has(library, open_tier, tmp_path):
    tier = open_tier({"url": f"file://{tmp_path}/store"})
    ours, theirs = keys_of(1234, salt="a"), keys_of(3, salt="b")
    store(tier, ours + theirs)
    folders = [path for path in tmp_path.rglob(key_tenant(ours[0]).hex()) if path.is_dir()]
    assert 1234 == sum(1 for folder in folders for _ in folder.iterdir())

    assert 1234 == tier.delete(OfTenant(key_tenant(ours[0])), LONG)
    assert 0 == tier.delete(OfTenant(key_tenant(ours[0])), LONG)
    assert ["done"] * 3 == read(tier, theirs)


def test_who_may_only_read_writes_nothing_not_even_a_manifest(s3, tier_at, between, bucket):
    tier, keys = tier_at(between.port, writable=False), keys_of(1)
    assert tier.probe(LONG).usable
    with pytest.raises(Unsupported):
        tier.put(items(keys), LONG)
    with pytest.raises(Unsupported):
        tier.delete(keys, LONG)
    assert ["missing"] == read(tier, keys)
    assert [] == s3.names(bucket)

    store(tier_at(s3.port), keys)
    assert ["done"] == read(tier, keys)
    between.fault = always(Fault("corrupt", HEADER), "GET")
    assert ["corrupt"] == read(tier, keys)
    assert [False] == tier.contains(keys, LONG)
    assert {"GET", "HEAD"} == {method for method, _ in between.seen}


# -- large blocks


def test_large_blocks_are_uploaded_in_parts_and_not_twice(tier_at, between):
    tier = tier_at(between.port, multipart_bytes=5 << 20, part_bytes=5 << 20)
    (key,), nbytes = keys_of(1), (11 << 20) + 5
    assert ["done"] == tier.put(items([key], nbytes), LONG)
    assert 3 == sum("partNumber" in path for _, path in between.seen)
    assert ["done"] == read(tier, [key], nbytes=nbytes)

    between.seen.clear()
    assert ["done"] == tier.put(items([key], nbytes), LONG)
    assert ["HEAD"] == [method for method, _ in between.seen]


def test_an_upload_that_does_not_end_in_time_is_late_and_nobody_sees_a_part_of_it(tier_at, between):
    tier = tier_at(between.port, multipart_bytes=5 << 20, part_bytes=5 << 20)
    (key,) = keys_of(1)
    between.fault = lambda method, path: Fault("hang") if "partNumber=2" in path else None

    assert ["late"] == tier.put(items([key], 11 << 20), 1.0)
    assert ["missing"] == read(tier, [key])
    assert [False] == tier.contains([key], LONG)


# -- the end


def test_closing_ends_calls_that_hang(tier_at, between):
    tier, keys = tier_at(between.port), keys_of(2)
    store(tier, keys)
    between.fault = always(Fault("hang"), "GET")
    answers = []
    thread = threading.Thread(target=lambda: answers.append(read(tier, keys, LONG)))
    thread.start()
    while not [1 for method, _ in between.seen if method == "GET"]:
        time.sleep(0.01)

    tier.close(30.0)
    thread.join(30.0)

    assert [["failed"] * 2] == answers
    with pytest.raises(Closed):
        tier.get([], LONG)
    assert not tier.probe(LONG).usable
    assert 200 == ask(between.upstream, "GET", "/")[0]
