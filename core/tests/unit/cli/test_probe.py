"""What `tensorway probe` measures: figures that belong together, memory given back, and whether a lane is slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorway.cli import probe
from tensorway.errors import MemoryInvalid
from tensorway.transport import Endpoint
from tensorway.transport.local import LocalFabric


@pytest.fixture
def ends():
    with Endpoint(LocalFabric(), "reader") as reader, Endpoint(LocalFabric(), "producer") as producer:
        yield reader, producer


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(probe, "_SMALL_READS", 30)


def test_a_measurement_says_by_which_way_and_how_fast(ends):
    reader, producer = ends
    producer.register(bytearray(1 << 20))
    found = probe.measure(reader, reader.connect(producer.describe()))
    assert ("local", "memmove", 1 << 20, "") == (found.transport, found.lane, found.nbytes, found.slow)
    assert 0 < found.latency_median <= found.latency_p95 < 1
    assert found.bandwidth > 1e6


def test_measuring_reads_all_that_the_peer_has_and_registers_nothing_for_good(ends):
    reader, producer = ends
    theirs = bytearray(3 << 20)
    producer.register(theirs)
    peer = reader.connect(producer.describe())
    probe.measure(reader, peer)
    reads = 30 + 20
    assert reads * 4096 + 6 * len(theirs) == reader.statistics()[peer.name]["read_bytes"]
    assert [] == reader._registrations


def test_memory_is_given_back_when_a_read_fails(ends):
    reader, producer = ends
    producer.register(bytearray(1 << 20))
    peer = reader.connect(producer.describe())
    producer.close()
    with pytest.raises(ConnectionError):
        probe.measure(reader, peer)
    assert [] == reader._registrations


@pytest.mark.parametrize("nbytes", [0, 4096])
def test_a_peer_with_too_little_memory_is_refused(ends, nbytes):
    reader, producer = ends
    if nbytes:
        producer.register(bytearray(nbytes))
    with pytest.raises(MemoryInvalid, match="less than 64 KiB"):
        probe.measure(reader, reader.connect(producer.describe()))


@pytest.mark.parametrize(
    ("lane", "same_host", "rdma", "slow"),
    [
        ("cma", True, (), ""),
        ("rdma", False, ("mlx5_0",), ""),
        ("tcp", True, (), "tcp between two processes of one machine: "),
        ("tcp", False, (), ""),
        ("tcp", False, ("mlx5_1", "mlx5_0"), "tcp, although this machine has RDMA devices: mlx5_0, mlx5_1"),
    ],
)
def test_a_slow_lane_is_named_where_there_is_a_better_one(tmp_path, monkeypatch, lane, same_host, rdma, slow):
    for name in rdma:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(probe, "Path", lambda _: tmp_path if rdma else Path(tmp_path, "nothing"))
    said = probe._slow(lane, same_host)
    assert said.startswith(slow)
    assert bool(said) == bool(slow)
