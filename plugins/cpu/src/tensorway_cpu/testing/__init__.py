"""Engines of pages in memory for tests and benchmarks of this dist; also called in processes of their own."""

from __future__ import annotations
