"""The suites of offloading hold for host memory."""

from __future__ import annotations

from tensorway.testing import OffloadingManagerSuite, OffloadingWorkerSuite


class TestManager(OffloadingManagerSuite):
    name = "cpu"
    options = {"manager": {"lease_seconds": 0.5}}
    lease = 0.5


class TestWorker(OffloadingWorkerSuite):
    name = "cpu"
