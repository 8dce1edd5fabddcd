"""What goes wrong with a shared folder: writers that are killed, full disks, file systems that do not answer."""

from __future__ import annotations

import random
import time

import pytest
from engines import Shape

from tensorway.kv import RequestView
from tensorway_kv.store.folder import Folder
from tensorway_kv.testing.engine import Deployment, counted, fill, until, verify, wipe
from tensorway_kv.testing.stores import (
    asking,
    files_below,
    fork_saving,
    hang,
    kill,
    load,
    look,
    no_files_longer_than,
    save,
    unhang,
    verify_prefix,
)

TOKENS, THEIRS, OURS = 16, [[9, 3, 17, 5]], [[2, 8, 4, 11]]
#: Requests that are long enough for a writer to be killed in the middle of one.
LONG, BLOCKS = 240, [list(range(60))]
WIDE = Shape(width=256)
ROUNDS = 30


@pytest.fixture
def deployment(ranks, tmp_path):
    made = Deployment(ranks, "shared-store", folder=str(tmp_path), lookup_deadline=30.0)
    yield made
    made.close()


def blocks_of(folder, rank=""):
    return [path for path in files_below(folder) if "blocks" in path.parts and f".r{rank}" in path.name]


def test_readers_see_whole_blocks_or_none_whenever_a_writer_is_killed(deployment, ranks, tmp_path):
    reader = deployment.engine("reader", WIDE)
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng, found, saved = random.Random(seed), [], 0
    folder = Folder(tmp_path / "v1" / "blocks")
    ranks.grow(deployment.used + 1)
    parent = ranks[deployment.used]  # which has no engine, and so no threads
    for number in range(ROUNDS):
        wanted = rng.randrange(58)
        options = {"folder": str(tmp_path), "path": f"/killed/{number}", "sync": True}
        writer = parent.call(fork_saving, WIDE, options, asking(f"w{number}", LONG, number), BLOCKS, number)
        last = time.monotonic() + 60
        while sum(1 for _ in folder.list()) - saved < wanted:
            assert time.monotonic() < last, "nothing is saved"
            time.sleep(rng.random() * 2e-3)
        parent.call(kill, writer)
        saved = sum(1 for _ in folder.list())
        view = asking(f"r{number}", LONG, number)
        tokens = look(reader, view).tokens
        found.append(tokens)
        if tokens:
            assert load(reader, view, BLOCKS, 0, tokens) is None
        reader.each(verify, BLOCKS, 0, tokens, number)
        reader.each(wipe)
    assert [0] == reader.each(counted, "mover", "kv_blocks_refused_total")
    assert any(0 < tokens < LONG for tokens in found), found
    assert len(files_below(tmp_path / "v1" / "blocks" / "new")) <= ROUNDS


def test_a_full_disk_fails_the_save_and_nothing_else(deployment, tmp_path):
    engine = deployment.engine("engine", Shape())
    save(engine, asking("before", TOKENS), THEIRS)
    view = asking("full", TOKENS, 2)
    engine.each(no_files_longer_than, 500)
    save(engine, view, THEIRS, 2)
    engine.each(no_files_longer_than, -1)
    assert ["", "full"] == [result.cause for result in engine.results]
    assert "File too large" in engine.results[-1].why
    engine.each(verify, THEIRS, 0, TOKENS, 2)
    assert 4 == len(blocks_of(tmp_path)) and not files_below(tmp_path / "v1" / "blocks" / "new")
    assert look(engine, asking("after", TOKENS, 2)).mode == "nothing"
    assert 1 == engine.planner.call(counted, "planner", "kv_requests_total", {"direction": "save", "cause": "full"})
    assert not [one for one in engine.ask("events") if set(one.hashes) & set(view.hashes)]
    save(engine, asking("again", TOKENS, 2), THEIRS, 2)
    until(lambda: look(engine, asking("after", TOKENS, 2)).tokens == TOKENS, engine)


def test_a_folder_that_cannot_be_written_any_more_fails_saves_and_serves_what_it_has(deployment, tmp_path):
    engine = deployment.engine("engine", Shape())
    save(engine, asking("before", TOKENS), THEIRS)
    fresh = tmp_path / "v1" / "blocks" / "new"
    fresh.rmdir()
    fresh.write_bytes(b"in the way")
    save(engine, asking("now", TOKENS, 2), THEIRS, 2)
    assert ["", "failed"] == [result.cause for result in engine.results]
    engine.each(wipe)
    view = asking("here", TOKENS)
    until(lambda: look(engine, view).tokens == TOKENS, engine)
    assert load(engine, view, OURS, 0, TOKENS) is None
    engine.each(verify, OURS, 0, TOKENS, 1)


def test_the_least_recently_used_blocks_make_room(deployment, tmp_path):
    first = deployment.engine("first", Shape())
    quota = 20 * 900  # a file is 768 bytes and what seals it
    for content in range(4):
        save(first, asking(f"s{content}", TOKENS, content), THEIRS, content)
        time.sleep(0.02)  # files know their time to a tick of the kernel's clock
    assert load_all(first, 0) is None  # so that it is not the least recently used any more
    engine = deployment.engine("engine", Shape(), max_bytes=quota)
    view = asking("new", TOKENS, 4)
    save(engine, view, THEIRS, 4)
    save(engine, asking("newer", TOKENS, 5), THEIRS, 5)
    folder = Folder(tmp_path / "v1" / "blocks")

    def size():
        return sum(entry.nbytes for entry in folder.list())

    until(lambda: size() <= quota, engine)
    assert size() > quota // 2
    kept = {content: look(first, asking(f"l{content}", TOKENS, content)).tokens for content in (0, 1, 5)}
    assert kept[1] < TOKENS == kept[0] == kept[5]
    assert 0 < engine.planner.call(counted, "planner", "kv_stored_bytes") <= quota
    for content in range(6, 12):
        save(engine, asking(f"s{content}", TOKENS, content), THEIRS, content)
    events = []
    until(lambda: events.extend(engine.ask("events")) or view.hashes[0] in of(events, "removed"), engine)
    assert set(of(events, "removed")) <= set(of(events, "stored"))


def load_all(engine, content):
    view = asking(f"use{content}", TOKENS, content)
    until(lambda: look(engine, view).tokens == TOKENS, engine)
    return load(engine, view, OURS, 0, TOKENS)


def of(events, what):
    return [block for event in events if event.what == what for block in event.hashes]


def test_looking_for_blocks_ends_also_when_the_folder_does_not_answer(deployment, tmp_path):
    engine = deployment.engine("engine", Shape(), lookup_deadline=0.4)
    save(engine, asking("one", TOKENS), THEIRS)
    until(lambda: look(engine, asking("two", TOKENS)).tokens == TOKENS, engine)
    labels = {"direction": "load", "cause": "deadline"}
    late = engine.planner.call(counted, "planner", "kv_requests_total", labels)  # a look that nobody kept from ending
    engine.planner.call(hang, str(tmp_path))
    modes = []
    view = asking("hangs", TOKENS)
    until(lambda: modes.append(engine.ask("lookup", view, 0).mode) or modes[-1] != "later", engine)
    assert ["later", "nothing"] == sorted(set(modes))
    assert late + 1 == engine.planner.call(counted, "planner", "kv_requests_total", labels)
    engine.planner.call(unhang)
    until(lambda: look(engine, asking("three", TOKENS)).tokens == TOKENS, engine)


@pytest.mark.parametrize("direction", ["load", "save"])
def test_what_hangs_ends_with_its_deadline_and_touches_no_page_afterwards(deployment, tmp_path, direction):
    engine = deployment.engine("engine", Shape(), deadline=2.0, threads=1)
    save(engine, asking("one", TOKENS), THEIRS)
    view = asking("two", TOKENS)
    until(lambda: look(engine, view).tokens == TOKENS, engine)
    engine.each(wipe)
    engine.each(hang, str(tmp_path))
    if direction == "load":
        assert 0 == load(engine, view, OURS, 0, TOKENS)
    else:
        save(engine, asking("two", TOKENS, 2), THEIRS, 2)
        engine.each(wipe)
    assert "deadline" == engine.results[-1].cause
    engine.movers[0].call(flush)
    engine.each(unhang)
    save(engine, asking("after", TOKENS, 3), THEIRS, 3)  # the one thread has come back to that
    engine.each(verify, THEIRS, 0, TOKENS, 3)
    assert look(engine, asking("half", TOKENS, 2)).mode == "nothing"


def flush(rank):
    rank.notes["mover"].flush(1.0)


def test_a_lost_prefix_of_one_rank_fails_all_with_what_all_have(deployment, tmp_path):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape(3))
    producer.each(fill, THEIRS, TOKENS, 1)
    save(producer, asking("first", 8), THEIRS)
    before = set(blocks_of(tmp_path, 1))
    save(producer, asking("all", TOKENS), THEIRS)
    view = asking("here", TOKENS)
    until(lambda: look(consumer, view).tokens == TOKENS, consumer)
    for path in set(blocks_of(tmp_path, 1)) - before:
        path.unlink()
    assert 8 == load(consumer, view, OURS, 0, TOKENS)
    consumer.each(verify_prefix, OURS, 0, 8, TOKENS, 1)
    assert {"missing"} == {one.cause for one in consumer.results if one.cause}
    assert 8 == look(consumer, asking("next", TOKENS)).tokens  # a block is what all ranks have of it


def test_a_mover_that_is_closed_in_the_middle_leaves_files_whole(deployment, tmp_path):
    engine = deployment.engine("engine", WIDE)
    engine.each(fill, BLOCKS, LONG, 1)
    assert engine.ask("finish", RequestView("one", LONG, hashes=asking("", LONG).hashes), BLOCKS, LONG).keep
    engine.begin()
    engine.close()
    again = deployment.again(engine)
    again.each(wipe)
    tokens = look(again, asking("two", LONG)).tokens
    if tokens:
        assert load(again, asking("two", LONG), BLOCKS, 0, tokens) is None
    again.each(verify, BLOCKS, 0, tokens, 1)
    assert [0] == again.each(counted, "mover", "kv_blocks_refused_total")
