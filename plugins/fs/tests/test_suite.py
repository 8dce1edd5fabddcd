"""What every tier must do, of both layouts and with little room."""

from __future__ import annotations

import pytest

offload_tiers = pytest.importorskip("tensorway.testing.offload_tiers", reason="this core has no suite for tiers")


class TestSegments(offload_tiers.TierSuite):
    name = "fs"

    @classmethod
    def options_in(cls, folder):
        return {"folder": str(folder)}


class TestStrictWithLittleRoom(offload_tiers.TierSuite):
    name = "fs"
    too_many = 6000

    @classmethod
    def options_in(cls, folder):
        return {"folder": str(folder), "segment_bytes": 1 << 20, "max_bytes": 16 << 20, "durability": "strict"}


class TestFiles(offload_tiers.TierSuite):
    name = "fs"
    too_many = 6000

    @classmethod
    def options_in(cls, folder):
        return {"folder": str(folder), "layout": "files", "max_bytes": 16 << 20}
