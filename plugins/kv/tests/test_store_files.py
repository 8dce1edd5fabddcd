"""Files of the shared store: whole or not there, never anything else; and an engine in this process that reads them."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time

import pytest
from engines import Shape
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tensorway
from tensorway.errors import (
    DeadlineExceeded,
    DescriptionInvalid,
    LayoutInvalid,
    OptionsInvalid,
    Unauthenticated,
    Unsupported,
)
from tensorway.kv import Group, KVContext, Part, Plane, RankGeometry
from tensorway.testing import OfferSuite
from tensorway_kv.layouts import Cache, Parallel, attention, latent
from tensorway_kv.offers import construct_shared_store
from tensorway_kv.store import opening, orders, sections
from tensorway_kv.store.folder import Folder
from tensorway_kv.store.options import SharedStoreOptions
from tensorway_kv.store.orders import Load, Orders, Save
from tensorway_kv.store.seals import OVERHEAD, Seals
from tensorway_kv.testing.engine import SECRET
from tensorway_kv.testing.memory import geometries
from tensorway_kv.testing.stores import Alone, asking, files_below

KEY = "a" * 40
LAYOUT, NAME = b"l" * 20, b"n" * 20
TOKENS, THEIRS, OURS = 16, [[9, 3, 17, 5]], [[2, 8, 4, 11]]


class TestOffer(OfferSuite):
    kind = "kv_connector"
    name = "shared-store"


# -- files


def test_a_file_is_there_as_a_whole_and_again_until_it_is_removed(tmp_path):
    folder = Folder(tmp_path, sync=True)
    assert folder.get(KEY, 0, 99) is None and not folder.has(KEY, 0) and not folder.remove(KEY, 0)
    assert 5 == folder.put(f"{KEY}/{KEY}", 1, [b"abc", bytearray(b"de")])
    assert 1 == folder.put(KEY, 0, [b"x"])
    assert 1 == folder.put(KEY, 0, [b"y"])
    assert {(f"{KEY}/{KEY}", 1, 5), (KEY, 0, 1)} == {(one.key, one.rank, one.nbytes) for one in folder.list()}
    assert (b"abcde", b"y", b"abc") == (
        folder.get(f"{KEY}/{KEY}", 1, 9),
        folder.get(KEY, 0, 1),
        folder.get(f"{KEY}/{KEY}", 1, 2),
    )
    assert folder.has(KEY, 0) and folder.remove(KEY, 0) and not folder.has(KEY, 0)


@pytest.mark.parametrize(
    "key", ["", "..", "../../../x", "a" * 40 + "/../b", "A" * 40, "a" * 7, "/" + "a" * 40, "a/b/c", "a" * 40 + "\n"]
)
def test_nothing_but_digests_becomes_a_path(tmp_path, key):
    for call in (lambda: Folder(tmp_path).has(key, 0), lambda: Folder(tmp_path).put(key, 0, [b"x"])):
        with pytest.raises(ValueError, match="no key"):
            call()
    assert not [path for path in files_below(tmp_path.parent) if path.name == "x"]


def test_links_pipes_and_folders_are_no_files(tmp_path):
    folder = Folder(tmp_path / "in")
    (tmp_path / "secret").write_bytes(b"not yours")
    for number, make in enumerate(
        [os.mkfifo, lambda path: path.symlink_to(tmp_path / "secret"), lambda path: path.mkdir()]
    ):
        key = f"{number}" * 40
        path = tmp_path / "in" / key[:2] / f"{key}.r0"
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        assert folder.get(key, 0, 99) is None and not folder.has(key, 0)
    assert not list(folder.list())
    folder.put("1" * 40, 0, [b"mine"])
    assert b"mine" == folder.get("1" * 40, 0, 99) and b"not yours" == (tmp_path / "secret").read_bytes()


def test_a_write_that_fails_leaves_nothing_and_what_dead_writers_left_is_removed(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    folder.put(KEY, 0, [b"before"])
    for name, fails in (("write", OSError(28, "No space left on device")), ("replace", OSError(5, "I/O error"))):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_, error=fails, **__: (_ for _ in ()).throw(error))
            with pytest.raises(OSError, match=fails.strerror):
                folder.put(KEY, 0, [b"after"])
    assert [b"before"] == [path.read_bytes() for path in files_below(tmp_path)]
    left = tmp_path / "new" / ("1" * 32)
    left.write_bytes(b"half")
    assert 0 == folder.tidy(60.0)
    os.utime(left, (1, 1))
    assert 1 == folder.tidy(60.0) and not left.exists()


def test_who_puts_a_link_to_somebody_s_files_there_has_none_of_them_removed(tmp_path):
    theirs, folder = tmp_path / "theirs", Folder(tmp_path / "shared")
    theirs.mkdir()
    (tmp_path / "shared").mkdir()
    for name in ("notes.txt", "a" * 32):
        (theirs / name).write_text("mine")
        os.utime(theirs / name, (1, 1))
    (tmp_path / "shared" / "new").symlink_to(theirs)
    assert 0 == folder.tidy(60.0)
    (tmp_path / "shared" / "new").unlink()
    theirs.rename(tmp_path / "shared" / "new")  # not a link: only what has a name of ours goes
    assert 1 == folder.tidy(60.0)
    assert ["notes.txt"] == [path.name for path in (tmp_path / "shared" / "new").iterdir()]


def test_writers_of_one_file_at_once_leave_one_of_theirs(tmp_path):
    folder = Folder(tmp_path)
    contents = [bytes([number]) * 200_000 for number in range(4)]
    seen, end = [], threading.Event()

    def read():
        while not end.is_set():
            seen.append(bytes(folder.get(KEY, 0, 1 << 20) or b""))

    writers = [
        threading.Thread(target=lambda one=one: [folder.put(KEY, 0, [one]) for _ in range(25)]) for one in contents
    ]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    end.set()
    reader.join()
    assert set(seen) <= {b"", *contents} and len(seen) > 1
    assert 1 == len(files_below(tmp_path))


# -- seals


@given(data=st.binary(max_size=200), edit=st.data())
def test_whatever_is_changed_of_a_file_it_is_refused(data, edit):
    seals = Seals("secret")
    file = bytearray(seals.seal(LAYOUT, NAME, 3, data) + data)
    assert seals.refuses(LAYOUT, NAME, 3, file) is None
    assert seals.refuses(LAYOUT, NAME, 2, file) == seals.refuses(NAME, NAME, 3, file) == "foreign"
    assert Seals("another").refuses(LAYOUT, NAME, 3, file) == "corrupt"
    how = edit.draw(st.sampled_from(["flip", "cut", "more"]))
    if how == "flip":
        file[edit.draw(st.integers(0, len(file) - 1))] ^= edit.draw(st.integers(1, 255))
    elif how == "cut":
        del file[edit.draw(st.integers(0, len(file) - 1)) :]
    else:
        file += edit.draw(st.binary(min_size=1, max_size=50))
    assert seals.refuses(LAYOUT, NAME, 3, file) in ("torn", "foreign", "corrupt")


def test_names_tell_tenants_and_epochs_apart():
    seals = Seals("secret")
    made = [
        Seals(secret).name(b"hash", Seals(secret).tenant(salt, epoch))
        for secret, salt, epoch in itertools.product(("secret", "other"), ("", "red", "blue"), ("", "1"))
    ]
    assert len(set(made)) == len(made)
    assert seals.name(b"hash", seals.tenant("red", "")) == made[2]
    assert seals.tenant("a\nb", "") != seals.tenant("b", "a")


# -- layouts


def test_layouts_do_not_depend_on_addresses_devices_gaps_or_how_many_pages():
    seals, facts = Seals("secret"), {"model": "tiny"}

    def fingerprints(pages=8, start=64, gap=0, order="NHD", **more):
        cache = Cache(range(2), attention(6, 8), 4, gap=gap, order=order)
        ranks = [one for one, _ in geometries([cache], Parallel(2), pages, start)]
        return [one.layout for one in sections.sections(ranks, {**facts, **more}, seals)]

    assert fingerprints() == fingerprints(32, 4096, 16)
    assert 3 == len({*fingerprints(), *fingerprints(order="HND"), *fingerprints(model="other")})


def test_ranks_with_equal_pages_write_one_file():
    ranks = [one for one, _ in geometries([Cache(range(2), latent(16), 4)], Parallel(4, dcp=2))]
    (section,) = sections.sections(ranks, {}, Seals("secret"))
    assert (0, 1, 0, 1) == section.places and (True, True, False, False) == section.writers


def test_each_group_is_a_section_of_its_own_and_layers_of_a_stage_are_where_they_are():
    caches = [Cache((0, 1), attention(2, 8), 4), Cache((2,), attention(2, 8), 4, window=8)]
    ranks = [one for one, _ in geometries(caches, Parallel(1, stages=(2, 1)))]
    first, second = sections.sections(ranks, {}, Seals("secret"))
    assert ((0, None), (None, 0)) == (first.places, second.places)


def test_a_manifest_that_was_changed_is_not_believed(tmp_path):
    seals, folder = Seals("secret"), Folder(tmp_path)
    ranks = [one for one, _ in geometries([Cache((0,), latent(16), 4)], Parallel(1))]
    (section,) = sections.sections(ranks, {"model": "tiny"}, seals)
    sections.write_manifest(folder, seals, section)
    assert section.manifest == sections.read_manifest(folder, seals, section.layout)
    assert sections.read_manifest(folder, seals, "b" * 40) is None
    (path,) = files_below(tmp_path)
    for change in (lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:-1] + b"\x77"):
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(DescriptionInvalid, match="not what was written"):
            sections.read_manifest(folder, seals, section.layout)
        sections.write_manifest(folder, seals, section)
        assert section.manifest == sections.read_manifest(folder, seals, section.layout)


# -- what is refused when it is opened


def context(*sizes, role="planner"):
    parts = (Part(0, "k", 0, 4, 2, 0, 1, 2, 2),)
    groups = tuple(Group(size) for size in sizes)
    return KVContext("prefill", None, role, geometry=RankGeometry((Plane("p", 0, 4096, 8, 8, 4, parts),), groups))


def test_what_cannot_be_stored_is_said_when_it_is_opened(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORWAY_SECRET", raising=False)
    options = {"folder": str(tmp_path), "secret": "secret"}
    for role in ("planner", "mover"):
        for error, why, given_, about in [
            (LayoutInvalid, "not given", options, KVContext("prefill", None, role)),
            (Unsupported, "a state", options, context(4, 0, role=role)),
            (Unsupported, "blocks of 4, 8", options, context(4, 8, role=role)),
            (Unauthenticated, "no secret", {"folder": str(tmp_path)}, context(4, role=role)),
            (OptionsInvalid, "No folder was named", {"secret": "secret"}, context(4, role=role)),
            (OptionsInvalid, "There is no folder", {**options, "folder": str(tmp_path / "x")}, context(4, role=role)),
        ]:
            with pytest.raises(error, match=why):
                construct_shared_store(SharedStoreOptions(**given_), about)


def test_a_folder_that_does_not_answer_is_waited_for_as_long_as_opening_may_take(tmp_path, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(opening.Path, "is_dir", lambda self: answer.wait(60))
    with pytest.raises(DeadlineExceeded, match="did not answer"):
        opening.folders(SharedStoreOptions(folder=str(tmp_path)), {}, Seals("secret"), 0.05)
    answer.set()


LIFE = "a life"


def test_orders_come_back_as_they_were():
    load = Load("r", 1.0, 3, 9, (NAME, NAME), (KEY,), ((0, -1), (0, 0)), ((1, 2), (3,)))
    made = Orders(orders.VERSION, LIFE, (load,), (Save("s", 1.0, 9, 1, (NAME,), ((1,),)),), ("x",))
    assert made == orders.decode(orders.encode(made), LIFE)
    assert not orders.decode(orders.encode(Orders(orders.VERSION, LIFE)), LIFE)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (b"\xc1", "cannot be read"),
        (orders.encode(Orders(99, LIFE, cancels=("x",))), "version 99"),
        (orders.encode(Orders(orders.VERSION, "another", cancels=("x",))), "life another"),
        (orders.encode(Orders(1, LIFE, (Load("r", 1.0, 0, 4, (b"short",), (), (), ()),))), "cannot be read"),
        (orders.encode(Orders(1, LIFE, (Load("r", 1.0, 0, 4, (NAME,), ("../x",), ((0,),), ()),))), "cannot be read"),
        (orders.encode(Orders(1, LIFE, (Load("r", 1.0, 0, 4, (NAME,), (KEY,), ((1,),), ()),))), "does not have"),
    ],
)
def test_a_plan_that_is_not_for_this_mover_is_refused(plan, why):
    with pytest.raises(DescriptionInvalid, match=why):
        orders.decode(plan, LIFE)


# -- an engine that reads what is there


@pytest.fixture(scope="module")
def service():
    with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as made:
        yield made


_numbers = itertools.count()


@pytest.fixture
def alone(service, tmp_path):
    made = []

    def opened(shape=None, device="cpu", copier=None, model="tiny", **options):
        options = {"folder": str(tmp_path), "lookup_deadline": 30.0, "path": f"/alone/{next(_numbers)}", **options}
        made.append(Alone(service, shape or Shape(), options, device, copier, model))
        return made[-1]

    yield opened
    for engine in made:
        engine.close()


def flipped(data, at, by):
    return data[:at] + bytes([data[at] ^ by]) + data[at + 1 :]


#: What may become of a file: which of its bytes, and what becomes of them, are chosen at random.
EDITS = {
    "header": lambda data, at, by: flipped(data, at % 56, by),
    "length": lambda data, at, by: flipped(data, 56 + at % 8, by),
    "seal": lambda data, at, by: flipped(data, 64 + at % 32, by),
    "payload": lambda data, at, by: flipped(data, OVERHEAD + at % (len(data) - OVERHEAD), by),
    "cut": lambda data, at, _: data[: at % len(data)],
    "trailing": lambda data, at, by: data + bytes([by]) * (1 + at % 5000),
    "another block": lambda data, *_: data,
    "gone": None,
}


def test_a_file_that_was_changed_in_any_way_is_a_miss_and_never_data(alone, tmp_path):
    engine = alone()
    count = itertools.count()

    @settings(
        max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
    )
    @given(
        which=st.integers(0, 3), how=st.sampled_from(sorted(EDITS)), at=st.integers(0, 1 << 16), by=st.integers(1, 255)
    )
    def try_one(which, how, at, by):
        content, files = next(count), []
        for end in range(1, 5):  # so that each file's block is known
            before = {path for path in files_below(tmp_path) if "blocks" in path.parts}
            view = asking(f"s{content}-{end}", 4 * end, content)
            assert not engine.save(view, [THEIRS[0][:end]], content).cause
            files += {path for path in files_below(tmp_path) if "blocks" in path.parts} - before
        engine.held.memory[:] = 0xEE
        assert TOKENS == engine.found(asking(f"l{content}", TOKENS, content))
        if how == "gone":
            files[which].unlink()
        else:
            data = files[which - 1 if how == "another block" else which].read_bytes()
            files[which].write_bytes(EDITS[how](data, at, by))
        result = engine.load(asking(f"l{content}", TOKENS, content), OURS, 0, TOKENS)
        assert ("missing" if how == "gone" else "corrupt", 4 * which) == (result.cause, result.tokens)
        engine.holds(OURS, 0, 4 * which, TOKENS, content)
        assert not files[which].exists()
        assert 4 * which == engine.found(asking(f"n{content}", TOKENS, content))

    try_one()


def device_copier(pairs):
    """Stands for a device that only it can reach: that memory is the host's, too."""
    for source, target in pairs:
        assert {"cpu", "cuda:0"} == {source.device, target.device}
        ctypes.memmove(target.address, source.address, source.nbytes)


@pytest.mark.parametrize("shape", [Shape(), Shape(order="HND")], ids=["same", "other"])
@pytest.mark.parametrize(("have", "stop"), [(0, 16), (5, 15)])
def test_memory_of_a_device_is_copied_through_the_host(alone, shape, have, stop):
    assert not alone(shape, "cuda:0", device_copier).save(asking("one", TOKENS), THEIRS).cause
    reader = alone(Shape(), "cuda:0", device_copier)
    view = asking("two", TOKENS)
    assert TOKENS - have == reader.found(view, have)
    assert not reader.load(view, OURS, have, stop - have).cause
    reader.holds(OURS, have, stop, stop, 1)


def test_memory_of_a_device_without_a_copier_is_refused(alone):
    with pytest.raises(Unsupported, match="no copier"):
        alone(Shape(), "cuda:0")


def test_another_block_size_is_not_taken_for_ours(alone):
    assert not alone().save(asking("one", TOKENS), THEIRS).cause
    assert 0 == alone(Shape(page_tokens=8)).found(asking("two", TOKENS))


def test_another_model_is_not_taken_for_ours(alone):
    assert not alone().save(asking("one", TOKENS), THEIRS).cause
    assert 0 == alone(Shape(order="HND"), model="other").found(asking("two", TOKENS))
    assert TOKENS == alone(Shape(order="HND")).found(asking("two", TOKENS))


def test_what_is_stored_outlives_who_stored_it_and_how_often(alone):
    first = alone()
    assert not first.save(asking("one", TOKENS), THEIRS).cause
    first.close()
    second = alone()
    for number in range(20):
        view = asking(f"two-{number}", TOKENS)
        assert TOKENS == second.found(view)
        assert not second.load(view, OURS, 0, TOKENS).cause
        second.holds(OURS, 0, TOKENS, TOKENS, 1)
    before = threading.active_count()
    second.close()
    assert threading.active_count() < before


def test_wrong_block_ids_are_refused_and_nothing_is_touched(alone):
    engine = alone()
    assert not engine.save(asking("one", TOKENS), THEIRS).cause
    engine.held.memory[:] = 0xEE
    for number, blocks in enumerate(([[2, 8, 4, 64]], [[2, 8, 4, -1]])):
        view = asking(f"two-{number}", TOKENS)
        assert TOKENS == engine.found(view)
        result = engine.load(view, blocks, 0, TOKENS)
        assert ("refused", 12) == (result.cause, result.tokens)
        engine.holds([[2, 8, 4]], 0, 12, 12, 1)
    view = asking("three", TOKENS)
    assert TOKENS == engine.found(view)
    assert "refused" == engine.load(view, [[2]], 0, TOKENS).cause
    assert engine.planner.finish(asking("four", TOKENS, 4), [[70, 1, 2, 3]], TOKENS).keep
    assert "four" in engine.ended("four").released and "refused" == engine.results[-1].cause


def test_what_other_weights_have_made_is_neither_received_nor_saved(alone):
    engine = alone()
    assert not engine.save(asking("one", TOKENS), THEIRS).cause
    view = asking("two", TOKENS)
    assert TOKENS - 4 == engine.found(view, 4)
    engine.planner.reserve(view, OURS, 4, TOKENS - 4)
    step = engine.planner.plan_step()
    engine.mover.submit(step.plan)
    until = time.monotonic() + 60
    while not (said := engine.mover.poll()):  # it has all arrived, and nobody has told the planner
        assert time.monotonic() < until
    assert not said[0].cause
    engine.planner.reset()
    engine.planner.on_results(0, said)
    assert {"two": 4} == engine.planner.plan_step().failed
    assert not engine.planner.finish(view, OURS, TOKENS).keep
    assert engine.planner.finish(asking("new", TOKENS), OURS, TOKENS).keep
    engine.ended("new")


def test_cancelled_loads_and_saves_give_their_blocks_back(alone):
    engine = alone()
    assert not engine.save(asking("one", TOKENS), THEIRS).cause
    view = asking("two", TOKENS)
    assert TOKENS == engine.found(view)
    engine.planner.reserve(view, OURS, 0, TOKENS)
    engine.planner.cancel("two")
    step = engine.ended("two")
    assert "two" in step.received or 0 <= step.failed["two"] <= TOKENS
    assert engine.planner.finish(asking("three", TOKENS, 3), THEIRS, TOKENS).keep
    engine.planner.cancel("three")
    assert "three" in engine.ended("three").released
    engine.mover.flush(5.0)
    assert not engine.planner.busy()
