from __future__ import annotations

import random

from tensorway_cpu.testing.campaign import run


def test_a_few_killed_lives_are_followed_by_whole_ones():
    seed = random.randrange(1 << 30)
    print("seed", seed)

    assert 4 == run(4, seed).total()
