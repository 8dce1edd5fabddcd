"""One engine per node, on real nodes: in time, or with the reason; and given back when the engines are dead."""

from __future__ import annotations

import os
import signal
import time

import pytest

import tensorway_ray
from tensorway.errors import Closed, DeadlineExceeded, SettingInvalid
from tensorway.testing.waiting import eventually


def engine(ray):
    class Engine:
        def where(self):
            import ray

            return ray.util.get_node_ip_address(), os.getpid()

    return ray.remote(Engine)


def free(ray):
    return ray.available_resources().get("CPU", 0)


def test_each_engine_is_on_a_node_of_its_own_which_is_told(ray, cluster):
    eventually(lambda: free(ray) == 6, 60)
    with tensorway_ray.one_per_node(3, {"CPU": 2}, deadline=60) as placement:
        engines = [engine(ray).options(**placement.options(rank)).remote() for rank in range(3)]
        told = ray.get([each.where.remote() for each in engines], timeout=120)
        assert tuple(address for address, _ in told) == placement.addresses
        assert len(set(placement.addresses)) == 3
    with pytest.raises(Closed):
        placement.options(0)
    eventually(lambda: free(ray) == 6, 60)


def test_what_no_node_has_is_told_in_time_with_what_each_lacks(ray, cluster):
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded) as late:
        tensorway_ray.one_per_node(2, {"GPU": 1, "CPU": 1}, deadline=2)
    assert 2 <= time.monotonic() - started < 2 + 10
    assert "0 of 3 nodes had that much free, and 2 are needed" in late.value.true
    for address in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
        assert f"{address}: 0 of 0 GPU free" in late.value.true
    # Ray would place it when somebody adds a GPU, and nobody would know of it.
    assert all(row["state"] == "REMOVED" for row in ray.util.placement_group_table().values())


def test_more_engines_than_nodes_and_nodes_that_are_busy_are_told_apart(ray, cluster):
    with pytest.raises(DeadlineExceeded, match="3 of 3 nodes had that much free, and 4 are needed"):
        tensorway_ray.one_per_node(4, {"CPU": 1}, deadline=1)
    with tensorway_ray.one_per_node(3, {"CPU": 2}), pytest.raises(DeadlineExceeded, match="0 of 2 CPU free"):
        tensorway_ray.one_per_node(1, deadline=1)


def test_places_are_given_back_when_the_last_engine_is_dead(ray, cluster):
    eventually(lambda: free(ray) == 6, 60)
    placement = tensorway_ray.one_per_node(2, {"CPU": 1})
    engines = [engine(ray).options(**placement.options(rank)).remote() for rank in range(2)]
    pids = [pid for _, pid in ray.get([each.where.remote() for each in engines], timeout=120)]
    placement.follow(engines)
    os.kill(pids[0], signal.SIGKILL)
    time.sleep(3)
    assert free(ray) == 4
    os.kill(pids[1], signal.SIGKILL)
    eventually(lambda: free(ray) == 6, 60)


@pytest.mark.parametrize(("count", "bundle"), [(0, {"CPU": 1}), (1, {"CPU": 0}), (-1, None)])
def test_what_is_no_amount_is_refused_before_ray_is_asked(count, bundle):
    with pytest.raises(SettingInvalid):
        tensorway_ray.one_per_node(count, bundle)
