"""Several connectors against the kit's suite: what holds of one connector holds of a composition."""

from __future__ import annotations

from tensorway.testing import ConnectorSuite

#: Short ones, so that what waits for a lease or a deadline need not wait long.
SHORT = {"transport": "local", "lease": 3.0, "deadline": 6.0, "presence": 3.0}


class TestSeveralOverLocal(ConnectorSuite):
    name = "several"
    # The second one loads only: where two keep the same blocks, each counts the request, and each says how it ended.
    options = {
        "children": [
            {"name": "peer", "backend": "handover", "options": SHORT},
            {"name": "other", "backend": "handover", "options": SHORT, "save": "never"},
        ],
        "deadline": 9.0,
    }
    any_geometry = True
