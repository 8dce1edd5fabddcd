"""For tests of managers and tiers: a tier that misbehaves, and campaigns. May import the core and its `testing`."""

from __future__ import annotations
