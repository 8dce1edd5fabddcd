"""The communicator `onesided` over the transport that is always there: the kit's suite, and what is its own."""

from __future__ import annotations

from tensorway.testing import SessionSuite


class TestOverLocal(SessionSuite):
    name = "onesided"
    options = {"transport": "local"}
