"""Tiers on a folder of the test, closed at its end."""

from __future__ import annotations

import attrs
import pytest

from tensorway_fs.options import FsOptions
from tensorway_fs.testing.blocks import CONTEXT, DEADLINE, block_of, key_of
from tensorway_fs.tier import SegmentTier


@pytest.fixture
def open_tier(tmp_path):
    opened = []

    def make(disk=None, context=None, **options):
        given = {"folder": str(tmp_path), "segment_bytes": 1 << 20, "refresh": 0.0, **options}
        opened.append(SegmentTier(FsOptions(**given), attrs.evolve(CONTEXT, **(context or {})), disk))
        return opened[-1]

    yield make
    for tier in opened:
        tier.close()


@pytest.fixture
def put():
    def store(tier, numbers):
        return tier.put([(key_of(number), memoryview(block_of(number))) for number in numbers], DEADLINE)

    return store


@pytest.fixture
def segments(tmp_path):
    """The files of segments, the oldest first."""

    def found():
        return sorted(tmp_path.rglob("*.seg"), key=lambda path: path.name)

    return found
