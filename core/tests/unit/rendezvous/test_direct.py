"""The store `direct`: the suite, and what is particular to it."""

from __future__ import annotations

import pytest

from tensorway.testing import RendezvousSuite

SECRET = "a secret of the tests"


class TestDirect(RendezvousSuite):
    name = "direct"

    @pytest.fixture
    def options(self):
        import tensorway

        with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as service:
            yield {"address": service.address, "secret": SECRET}
