"""A slice of the endurance run over NIXL; the long one is `python -m tensorway.testing.endurance nixl`."""

from __future__ import annotations

import pytest

from tensorway.testing import endurance


@pytest.mark.parametrize("options", ["{}", '{"ucx_tls": ["tcp"]}'], ids=["cma", "tcp"])
def test_nothing_grows_over_many_transfers_and_connections(real_nixl, options, capfd):
    command = ["nixl", "--transfers", "2000", "--connections", "100", "--options", options]

    assert 0 == endurance.main(command), capfd.readouterr().out
