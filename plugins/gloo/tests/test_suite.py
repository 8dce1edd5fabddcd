"""The communicator `gloo` against the kit's suite; what is its own is in `test_session`."""

from __future__ import annotations

import pytest

from tensorway.testing import SessionSuite


@pytest.mark.usefixtures("torch_is_here")
class TestGloo(SessionSuite):
    name = "gloo"
