"""Campaigns and helpers for the tests of this dist. May import all of the dist and the core."""

from __future__ import annotations
