"""The session of `nccl` against the kit's suite, over what needs no device; real NCCL has not run it yet."""

from __future__ import annotations

import pytest

from tensorway.testing import SessionSuite


@pytest.mark.usefixtures("over_a_stand_in")
class TestDirectLaneOverAStandIn(SessionSuite):
    """The calls of NCCL, answered by `standins/standin.c`."""

    name = "nccl-over-a-stand-in"


@pytest.mark.usefixtures("over_gloo")
class TestTorchLaneOverGloo(SessionSuite):
    """The calls of torch.distributed, answered by its gloo."""

    name = "nccl-over-gloo"
