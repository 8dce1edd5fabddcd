"""Blocks through a folder, with real processes: engines that share nothing else find and load what others saved."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from engines import Shape

from tensorway.testing.ranks import Ranks
from tensorway_kv.testing.engine import Deployment, counted, fill, until, verify, wipe
from tensorway_kv.testing.memory import JUNK
from tensorway_kv.testing.stores import abort, asking, files_below, load, look, save, verify_prefix

TOKENS = 19
FULL = 16
THEIRS, OURS = [[9, 3, 17, 5, 1]], [[2, 8, 4, 11, 7, 0, 12]]


@pytest.fixture(scope="module")
def groups():
    """Two groups of processes, each with a rendezvous of its own."""
    with Ranks() as one, Ranks() as other:
        yield one, other


@pytest.fixture
def store(groups, tmp_path):
    """Engines `prefill` and `decode` on either side of a folder, as they are asked for."""
    made = [Deployment(ranks, "shared-store", folder=str(tmp_path), lookup_deadline=30.0) for ranks in groups]

    def pair(theirs=None, own=None, **options):
        return (
            made[0].engine("prefill", theirs or Shape(), **options),
            made[1].engine("decode", own or theirs or Shape(), **options),
        )

    yield SimpleNamespace(pair=pair, folder=tmp_path, deployments=made)
    for deployment in made:
        deployment.close()


def find(engine, view, tokens, have=0):
    """So much is found, at last: another engine may have said a moment ago what its files hold."""
    until(lambda: look(engine, view, have).tokens == tokens, engine)


@pytest.mark.parametrize(
    ("theirs", "own"),
    [
        (Shape(1), Shape(1)),
        (Shape(2), Shape(2)),
        (Shape(2), Shape(3)),
        (Shape(3), Shape(1)),
        (Shape(1, order="HND"), Shape(2, order="NHD")),
        (Shape(2, heads=1), Shape(1, heads=1)),
        (Shape(1, heads=1), Shape(2, heads=1)),
    ],
    ids=["1-1", "2-2", "2-3", "3-1", "HND-NHD", "replicas-1", "1-replicas"],
)
def test_every_byte_of_full_blocks_arrives(store, theirs, own):
    producer, consumer = store.pair(theirs, own)
    save(producer, asking("one", TOKENS), THEIRS)
    view = asking("one-here", TOKENS)
    find(consumer, view, FULL)
    assert load(consumer, view, OURS, 0, FULL) is None
    consumer.each(verify, OURS, 0, FULL, 1)
    assert {"mode": "background", "sources": {"files": FULL}} == {
        name: getattr(look(consumer, asking("again", TOKENS)), name) for name in ("mode", "sources")
    }


@pytest.mark.parametrize(("have", "stop"), [(4, 16), (5, 16), (0, 15), (6, 7), (15, 16)])
@pytest.mark.parametrize("own", [Shape(1), Shape(2, order="HND")], ids=["same", "other"])
def test_only_what_is_missing_is_written(store, own, have, stop):
    producer, consumer = store.pair(Shape(1), own)
    save(producer, asking("one", TOKENS), THEIRS)
    view = asking("part", TOKENS)
    find(consumer, view, FULL - have, have)
    assert load(consumer, view, OURS, have, stop - have) is None
    consumer.each(verify, OURS, have, stop, 1)


def test_a_prefix_is_found_and_what_follows_it_is_saved_once(store):
    producer, consumer = store.pair()
    save(producer, asking("short", 10), [THEIRS[0][:3]])
    view = asking("long", TOKENS)
    find(consumer, view, 8)
    assert load(consumer, view, OURS, 0, 8) is None
    consumer.each(fill, OURS, TOKENS, 1, 8)
    before = set(files_below(store.folder))
    assert consumer.ask("finish", view, OURS, TOKENS).keep
    until(lambda: "long" in consumer.released, consumer)
    assert 2 == len(set(files_below(store.folder)) - before)
    find(producer, asking("again", TOKENS), FULL)


def test_nothing_is_stored_of_what_was_aborted_or_is_not_to_be_saved(store):
    producer, _ = store.pair(save=False)
    producer.each(fill, THEIRS, TOKENS, 1)
    view = asking("one", TOKENS)
    assert not producer.ask("finish", view, THEIRS, TOKENS).keep
    other = store.deployments[0].engine("other", Shape())
    assert not other.planner.call(abort, view, THEIRS)
    assert not other.ask("finish", asking("tiny", 3), [[1]], 3).keep
    assert not other.step()
    assert look(other, view).mode == "nothing"
    assert not [path for path in files_below(store.folder) if "blocks" in path.parts]


def test_tenants_do_not_find_each_other(store):
    producer, consumer = store.pair()
    save(producer, asking("one", TOKENS, tenant="red"), THEIRS)
    find(consumer, asking("same", TOKENS, tenant="red"), FULL)
    for tenant in ("", "blue", "Red"):
        assert look(consumer, asking(f"x{tenant}", TOKENS, tenant=tenant)).mode == "nothing"
    names = "".join(str(path) for path in files_below(store.folder))
    assert "red" not in names.removeprefix(str(store.folder))


def test_who_knows_another_secret_finds_nothing(store):
    producer, consumer = store.pair()
    save(producer, asking("one", TOKENS), THEIRS)
    find(consumer, asking("two", TOKENS), FULL)
    assert 1 == len([path for path in files_below(store.folder) if "layouts" in path.parts])  # of who saves
    stranger = store.deployments[1].engine("stranger", Shape(), secret="another secret")
    assert look(stranger, asking("two", TOKENS)).mode == "nothing"


def test_after_a_reset_nothing_that_was_stored_is_found(store):
    producer, consumer = store.pair()
    save(producer, asking("one", TOKENS), THEIRS)
    find(consumer, asking("two", TOKENS), FULL)
    consumer.ask("reset")
    assert look(consumer, asking("two", TOKENS)).mode == "nothing"
    save(consumer, asking("three", TOKENS), OURS, 7)
    find(consumer, asking("four", TOKENS), FULL)
    find(producer, asking("five", TOKENS), FULL)
    producer.each(wipe)
    assert load(producer, asking("five", TOKENS), THEIRS, 0, FULL) is None
    producer.each(verify, THEIRS, 0, FULL, 1)  # and not what the weights of the other say


def test_a_window_needs_its_last_blocks_only(store):
    producer, consumer = store.pair(Shape(window=8), Shape(2, window=8))
    producer.each(fill, THEIRS, TOKENS, 1)
    view = asking("one", TOKENS)
    assert producer.ask("finish", view, [THEIRS[0][2:]], TOKENS).keep
    until(lambda: "one" in producer.released, producer)
    find(consumer, asking("two", TOKENS), FULL)
    assert load(consumer, asking("two", TOKENS), [OURS[0][2:4]], 0, FULL) is None
    consumer.each(verify, OURS, 8, FULL, 1)
    assert look(consumer, asking("short", 12)).mode == "nothing"


def test_routers_hear_what_is_stored_and_operators_what_was_moved(store):
    producer, consumer = store.pair(Shape(2))
    view = asking("one", TOKENS, tenant="red")
    save(producer, view, THEIRS)
    told = []
    until(lambda: told.extend(producer.ask("events")) or told, producer)
    (event,) = told
    assert ("stored", view.hashes, 0, "files", 4, "red") == (
        event.what, event.hashes, event.group, event.medium, event.block_tokens, event.salt,
    )  # fmt: skip
    assert not producer.ask("events")
    save(producer, asking("two", TOKENS, tenant="red"), THEIRS)
    assert not producer.ask("events")  # they were there
    producer.ask("reset")
    assert ["cleared"] == [one.what for one in producer.ask("events")]
    find(consumer, view, FULL)
    load(consumer, view, OURS, 0, FULL)
    labels = {"peer": "files", "cause": "none"}
    assert 2 == producer.planner.call(counted, "planner", "kv_requests_total", {"direction": "save", **labels})
    assert 1 == consumer.planner.call(counted, "planner", "kv_requests_total", {"direction": "load", **labels})
    assert [1, 1] == consumer.each(counted, "mover", "kv_transfers_total", {"direction": "load", **labels})
    moved = [
        sum(side.each(counted, "mover", "kv_bytes_total", {"direction": direction}))
        for side, direction in ((producer, "save"), (consumer, "load"))
    ]
    assert [FULL * 2 * 2 * 6 * 8] * 2 == moved  # layers, keys and values, heads, bytes of a head


def damaged(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), damaged], ids=["gone", "damaged"])
def test_a_block_that_vanishes_or_rots_fails_its_request_with_what_is_good(store, harm):
    producer, consumer = store.pair()
    before = set(files_below(store.folder))
    for tokens in (8, TOKENS):
        save(producer, asking(f"to-{tokens}", tokens), THEIRS)
        new = set(files_below(store.folder)) - before
        before |= new
    view = asking("here", TOKENS)
    find(consumer, view, FULL)
    good = {}
    for path in sorted(new):
        harm(path)
        break
    assert load(consumer, view, OURS, 0, FULL) in (8, 12)
    (result,) = [one for one in consumer.results if one.request == "here"]
    good = result.tokens
    assert result.cause in ("missing", "corrupt") and result.why.startswith("Store files: ")
    consumer.each(verify_prefix, OURS, 0, good, FULL, 1)
    find(consumer, asking("next", TOKENS), good)
    refused = consumer.each(counted, "mover", "kv_blocks_refused_total", {"cause": "corrupt"})
    assert [result.cause == "corrupt"] == refused
    save(producer, asking("anew", TOKENS), THEIRS)
    find(consumer, asking("whole", TOKENS), FULL)


def test_what_nobody_looked_for_is_not_loaded(store):
    _, consumer = store.pair()
    consumer.ask("reserve", asking("one", TOKENS), OURS, 3, 8)
    consumer.step()
    until(lambda: consumer.failed, consumer)
    assert {"one": 3} == consumer.failed and not consumer.results
    consumer.each(verify, OURS, 0, 0, JUNK)
