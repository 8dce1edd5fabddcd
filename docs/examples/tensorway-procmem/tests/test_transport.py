"""What the core asks of every transport, proven with real processes that are killed, stopped and restarted.

The dist must be installed: this process and the peer find it as a user's program does. Each test's docstring ends with
what to look at if it fails. To replace one, say why in `overridden`; a reason is shown, silence is a failure.
"""

from __future__ import annotations

from typing import ClassVar

from tensorway.testing import TransportSuite


class TestTransport(TransportSuite):
    name = "procmem"
    #: What the endpoints of these tests are constructed with.
    options: ClassVar[dict[str, object]] = {}
