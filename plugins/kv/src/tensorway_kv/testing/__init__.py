"""For tests of hand-overs beyond one process: hostile messages by the hundred thousand."""

from __future__ import annotations
