"""For tests of the movement with real processes: a small engine, and campaigns of deaths over it."""

from __future__ import annotations
