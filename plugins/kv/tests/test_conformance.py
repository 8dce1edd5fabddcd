"""The connectors of this dist against the kit's suite, over every transport that is here."""

from __future__ import annotations

from engines import TRANSPORTS

from tensorway.testing import ConnectorSuite

#: Short ones, so that what waits for a lease or a deadline need not wait long.
SHORT = {"lease": 3.0, "deadline": 6.0, "presence": 3.0}
needs_nixl = TRANSPORTS[1].marks[0]


class TestHandoverOverLocal(ConnectorSuite):
    name = "handover"
    options = {"transport": "local", **SHORT}
    any_geometry = True


@needs_nixl
class TestHandoverOverNixl(ConnectorSuite):
    name = "handover"
    options = {"transport": "nixl", **SHORT}
    any_geometry = True


class TestHandoverByPush(ConnectorSuite):
    name = "handover"
    options = {"transport": "local", "prefer": "push", "staging_blocks": 64, **SHORT}
    any_geometry = True


class TestSharedStore(ConnectorSuite):
    name = "shared-store"
    options = {"deadline": 6.0, "presence": 3.0, "lookup_deadline": 30.0}

    @classmethod
    def options_in(cls, folder):
        return {**cls.options, "folder": str(folder)}
