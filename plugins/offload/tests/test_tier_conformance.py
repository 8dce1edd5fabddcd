"""The core's suite of tiers, over `peer` with another engine that has the blocks."""

from __future__ import annotations

import itertools
from typing import ClassVar

import attrs
import pytest

import tensorway
from tensorway.memory import Region, shared
from tensorway.testing import TierSuite
from tensorway.testing.offload_ground import block_of
from tensorway.testing.offload_reading import NBYTES
from tensorway_offload.testing.rows import until


class Lender:
    """What another engine has, in rows as long as the longest block."""

    def __init__(self, count, row_bytes):
        self.memory, self.row_bytes, self.where = shared(count * row_bytes), row_bytes, {}

    def keep(self, keys):
        for key in keys:
            row = self.where.setdefault(key, len(self.where))
            data = block_of(key, NBYTES)
            self.memory[row * self.row_bytes : row * self.row_bytes + len(data)] = data

    def lend(self, keys, seconds):
        return [self.where.get(key) for key in keys]

    def returned(self, keys):
        pass


class TestPeer(TierSuite):
    name = "peer"
    options: ClassVar[dict] = {"answer": 20.0, "most_lent": 100_000}
    numbers = itertools.count()
    #: By the folder of a test: the rendezvous, and engines that lend.
    worlds: ClassVar[dict] = {}

    @pytest.fixture(autouse=True)
    def world(self, tmp_path):
        rendezvous = tensorway.create("rendezvous", "direct", {"secret": "a secret of these tests"})
        self.lenders = {}
        self.worlds[tmp_path] = rendezvous, self.lenders
        yield
        del self.worlds[tmp_path]
        for _, tier in self.lenders.values():
            tier.close()
        rendezvous.close()

    @classmethod
    def make(cls, folder, context):
        rendezvous, lenders = cls.worlds[folder]
        context = attrs.evolve(context, engine=f"e{next(cls.numbers)}", services={"rendezvous": rendezvous})
        if context.fingerprint not in lenders:
            lender = Lender(1200 if "many" in folder.name else 64, max(NBYTES))
            about = attrs.evolve(
                context, engine="lender", memory=Region.of(lender.memory), row_bytes=max(NBYTES), lender=lender
            )
            lenders[context.fingerprint] = lender, tensorway.create("offload_tier", "peer", cls.options, about)
        return super().make(folder, context)

    def fill(self, tier, keys):
        lender, _ = next(iter(self.lenders.values()))
        lender.keep(keys)
        until(lambda: all(tier.contains(keys, 20.0)))
