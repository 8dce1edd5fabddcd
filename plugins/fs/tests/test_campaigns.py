"""Short slices of the campaigns; `python -m tensorway_fs.testing.crash` and `.corruption` are the long ones."""

from __future__ import annotations

import random

from tensorway_fs.testing import corruption, crash


def test_writers_that_end_without_a_word_lose_nothing(tmp_path):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    counts = crash.campaign(tmp_path, 160, seed, print, whole=False)
    assert counts["done"] and counts["at a call"] and counts["at an instant"]


def test_a_writer_is_ended_at_each_of_its_system_calls(tmp_path):
    counts = crash.Counter()
    for _ in range(10):
        seed = random.randrange(1 << 30)
        print("seed", seed)
        crash.sweep(crash.Scene(tmp_path / "crash", crash.Ledger(48)), seed, counts, steps=2)
        assert counts["sweep before"] == counts["sweep after"] > 10
        if counts["done"]:  # one life in sixteen stores nothing, and proves little
            break
    assert counts["done"]


def test_a_loss_of_power_loses_nothing_that_strict_has_stored(tmp_path):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    counts = crash.Counter()
    for number in range(25):
        rng = random.Random(f"{seed}:{number}")
        scene = crash.Scene(tmp_path / "crash", crash.Ledger(96))
        scene.renew(rng)
        scene.durability = "strict"
        crash.without_power(scene, rng)
        crash.judged(scene, crash.Judge(keeps=True, deletes=False, damages=True), counts)
    assert counts["done"]


def test_damage_of_any_kind_is_seen(tmp_path):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    counts = corruption.campaign(tmp_path, 200, seed, print)
    assert counts["done"] and counts["corrupt"] and counts["missing"]
