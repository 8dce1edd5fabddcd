"""What the core asks of every tier: bytes, tenants, deadlines, damage, and that it outlives its process."""

from __future__ import annotations

from pathlib import Path

from tensorway.testing import TierSuite


class TestTier(TierSuite):
    name = "sqlite"
    #: So many blocks of 4 KiB do not fit.
    too_many = 3000

    @classmethod
    def options_in(cls, folder: Path) -> dict[str, object]:
        """Eight megabytes in a file that the tiers of one test share, and no other test's do."""
        return {"path": str(folder / "blocks.sqlite"), "max_bytes": 8 << 20}
