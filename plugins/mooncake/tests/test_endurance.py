"""A slice of the endurance run over Mooncake; the long one is `python -m tensorway.testing.endurance mooncake`."""

from __future__ import annotations

import random

from tensorway.testing import endurance

#: Connections that Mooncake opens to one peer, as it needs them, and keeps.
LANES = 4


def test_nothing_grows_over_many_transfers_and_connections(real_mooncake, capfd):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    command = ["mooncake", "--transfers", "2000", "--connections", "100", "--kept-files", str(LANES - 1)]

    assert 0 == endurance.main([*command, "--seed", str(seed)]), capfd.readouterr().out
