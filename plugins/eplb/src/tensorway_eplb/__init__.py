"""Tensorway's rebalance: which rank holds which expert, what has to move, and moving it without a half-commit."""

from __future__ import annotations
