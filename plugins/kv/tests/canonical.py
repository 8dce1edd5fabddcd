"""Engines whose every byte says what it is: layer, component, position, head, byte. Reads copy what a plan says."""

from __future__ import annotations

import attrs
import numpy as np

from tensorway.transport.blocks import covered
from tensorway_kv.reads import Held, Reads
from tensorway_kv.testing.memory import Rank, geometries
from tensorway_kv.topology import EngineTransferInfo, TransferTopology

JUNK, UNTOUCHED = -1, -7


@attrs.define
class Engine:
    """All ranks of an engine; their memory holds one request's bytes, or none."""

    ranks: list[Rank]
    blocks: list[list[int]]

    @classmethod
    def of(cls, caches, parallel, *, tokens=0, reserved=0, pages=8, seed=0):
        """With blocks for `reserved` tokens, of which `tokens` are filled in."""
        rng, fill = np.random.default_rng(seed), JUNK if tokens else UNTOUCHED
        ranks = [Rank(one, np.full(size, fill)) for one, size in geometries(caches, parallel, pages)]
        blocks = []
        for group in ranks[0].geometry.groups:
            count = -(-reserved // group.block_tokens) if group.block_tokens else 2
            blocks.append(rng.permutation(pages)[:count].tolist())
        made = cls(ranks, blocks)
        for rank in ranks if tokens else ():
            for _, places, names in rank.places(blocks, range(tokens)):
                rank.memory[places] = names
        return made

    @property
    def geometries(self):
        return [rank.geometry for rank in self.ranks]

    def info(self, name="prefill", incarnation="1"):
        return EngineTransferInfo(name, incarnation, tuple(self.geometries))


def carry_out(reads, plan, reader, producer):
    """Copy what a plan says; how often each byte of the reader was written."""
    writes = np.zeros(len(reader.memory), int)
    for rank, batches in plan.items():
        for batch in batches:
            local, remote = reads.routes(rank)[batch.route]
            assert (local.block_bytes, local.width) == (remote.block_bytes, remote.width)
            assert covered(local, [plane.region for plane in reader.geometry.planes])
            assert covered(remote, [plane.region for plane in producer.ranks[rank].geometry.planes])
            assert len(batch.local) == len(batch.remote) > 0
            assert 0 <= batch.local.min() and batch.local.max() < local.count
            assert 0 <= batch.remote.min() and batch.remote.max() < remote.count
            within = np.arange(local.block_bytes)
            for mine, its in zip(local.bases, remote.bases, strict=True):
                target = (mine + batch.local * local.stride)[:, None] + within
                np.add.at(writes, target, 1)
                reader.memory[target] = producer.ranks[rank].memory[
                    (its + batch.remote * remote.stride)[:, None] + within
                ]
    return writes


def read_all(own, theirs, start, stop, *, states=True, own_held=None, their_held=None):
    """Read a range into all ranks of an engine, and see that every wanted byte is there, once, and no other."""
    for number, rank in enumerate(own.ranks):
        topology = TransferTopology(own.geometries, number)
        topology.register_remote_engine(theirs.info())
        reads = Reads(topology, "prefill")
        assert reads.producers == topology.source_ranks("prefill")
        plan = reads.plan(own_held or Held(own.blocks), their_held or Held(theirs.blocks), start, stop, states=states)
        expected = np.full(len(rank.memory), UNTOUCHED)
        for group, of_group in enumerate(rank.geometry.groups):
            begin = max(start, stop - of_group.window) if of_group.window else start
            for plane, places, names in rank.places(own.blocks, range(begin, stop), states):
                if plane.group == group:
                    expected[places] = names
        writes = carry_out(reads, plan, rank, theirs)
        np.testing.assert_array_equal(rank.memory, expected)
        np.testing.assert_array_equal(writes, expected != UNTOUCHED)
