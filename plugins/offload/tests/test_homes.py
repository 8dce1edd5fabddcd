"""Both ways to keep rows by key do the same."""

from __future__ import annotations

import random

import pytest

from tensorway.offload import make_offload_key
from tensorway_offload.homes import FEW, ManyHomes, OneHome
from tensorway_offload.index import Index


@pytest.mark.parametrize("homes", [OneHome(), ManyHomes(0), ManyHomes(1 << 20), ManyHomes(1 << 31)])
def test_rows_are_found_by_key_until_they_are_popped(homes):
    rng, model = random.Random(1), {}
    for turn in range(200):
        some = [make_offload_key(rng.randbytes(1) * 16, salt=rng.choice("ab")) for _ in range(12)]
        assert homes.get(some) == [model.get(key) for key in some]  # also of keys that are there twice
        new = [key for key in dict.fromkeys(some) if key not in model]
        rows = rng.sample(range(1000), len(new))
        homes.put(new, rows)
        model.update(zip(new, rows, strict=True))
        gone = rng.sample(list(model), len(model) // 4)
        assert homes.pop(gone) == [model.pop(key) for key in gone]
        if turn % 50 == 49:
            assert sorted(homes.clear()) == sorted(model.values())
            model.clear()


def test_blocks_that_are_many_are_not_in_one_dict():
    assert type(Index(FEW)._homes) is OneHome
    assert type(Index(FEW + 1)._homes) is ManyHomes
