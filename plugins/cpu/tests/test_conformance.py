"""The suites of offloading hold for host memory."""

from __future__ import annotations

from tensorway.testing import OffloadingManagerSuite, OffloadingWorkerSuite


class TestManager(OffloadingManagerSuite):
    name = "cpu"
    options = {"manager": {"lease_seconds": 3.0}}
    lease = 3.0


class TestWorker(OffloadingWorkerSuite):
    name = "cpu"
