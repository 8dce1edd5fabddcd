"""Tensorway's offloading: the manager over any primary tier, eviction policies, and the composition of tiers."""

from __future__ import annotations
