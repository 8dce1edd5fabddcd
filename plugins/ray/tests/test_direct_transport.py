"""Tensors between real actors on two nodes, over `local` and over NIXL by TCP; time-outs, garbage, refusals."""

from __future__ import annotations

import inspect
import os
import signal
import time
from pathlib import Path

import pytest

import tensorway_ray
from tensorway.errors import BackendConflict, BackendUnavailable, SettingInvalid
from tensorway.testing.waiting import eventually
from tensorway_ray.direct_transport import METHODS, REGISTER, check

SECONDS = 4.0
TRANSPORTS = {
    "local": ("local", {}),
    "nixl": ("nixl", {"ucx_tls": ["tcp"]}),
    "absent": ("rixl", {}),
}


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason="needs torch: pip install torch")


@pytest.fixture(scope="session")
def labels(cluster, torch):
    """Registered once, before any actor is made."""
    return {
        name: tensorway_ray.register(f"tw_{name}", transport, options, seconds=SECONDS)
        for name, (transport, options) in TRANSPORTS.items()
    }


def actor(ray, number):
    class Holder:
        def make(self, seed, sizes):
            import torch

            made = torch.Generator().manual_seed(seed)
            self.whole = torch.randn(sum(sizes) + 8, generator=made)
            return [*self.whole[8:].split(sizes), torch.arange(7), torch.empty(0)]

        def digest(self, tensors):
            return [(tuple(each.shape), str(each.dtype), each.double().sum().item()) for each in tensors]

        def pid(self):
            return os.getpid()

        def held(self, label):
            from ray.experimental.rdt.util import get_tensor_transport_manager

            return len(get_tensor_transport_manager(label)._held)

        def fetched_in(self, references, seconds):
            """In a thread of the actor's own, as an engine would: the tensors' sums, or the error's name."""
            import time

            import ray

            started = time.monotonic()
            try:
                return [each.double().sum().item() for each in ray.get(references[0], timeout=seconds)]
            except Exception as error:
                return type(error).__name__, time.monotonic() - started

    made = ray.remote(enable_tensor_transport=True)(Holder)
    return made.options(resources={f"node{number}": 0.1}, num_cpus=0).remote()


@pytest.fixture(scope="module")
def pair(ray, labels):
    """Two actors on two nodes."""
    pair = actor(ray, 2), actor(ray, 3)
    ray.get([each.pid.remote() for each in pair], timeout=120)
    yield pair
    for each in pair:
        ray.kill(each)


def expected(torch, seed, sizes):
    whole = torch.randn(sum(sizes) + 8, generator=torch.Generator().manual_seed(seed))
    return [*whole[8:].split(sizes), torch.arange(7), torch.empty(0)]


def summed(tensors):
    return [(tuple(each.shape), str(each.dtype), each.double().sum().item()) for each in tensors]


@pytest.mark.parametrize("name", ["local", "nixl"])
def test_what_an_actor_returns_another_one_on_another_node_is_given(ray, torch, labels, pair, name):
    sizes = [1000, 1000, 3, 1 << 20]
    reference = pair[0].make.options(tensor_transport=labels[name]).remote(1, sizes)
    assert ray.get(pair[1].digest.remote(reference), timeout=60) == summed(expected(torch, 1, sizes))


@pytest.mark.parametrize("name", ["local", "nixl"])
def test_the_driver_gets_it_byte_by_byte_and_into_memory_of_its_own(ray, torch, labels, pair, name):
    sizes = [5, 1 << 16]
    reference = pair[0].make.options(tensor_transport=labels[name]).remote(2, sizes)
    wanted = expected(torch, 2, sizes)
    got = ray.get(reference, timeout=60)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    targets = [torch.zeros_like(each) for each in wanted]
    ray.experimental.set_target_for_ref(reference, targets)
    ray.get(reference, timeout=60)
    assert all(torch.equal(one, other) for one, other in zip(targets, wanted, strict=True))


def test_when_the_last_reference_goes_nothing_stays_registered(ray, torch, labels, pair):
    label = labels["nixl"]
    references = [pair[0].make.options(tensor_transport=label).remote(seed, [4000]) for seed in range(3)]
    for seed, reference in enumerate(references):
        assert ray.get(pair[1].digest.remote(reference), timeout=60) == summed(expected(torch, seed, [4000]))
    # Of each object the numbers, and the tensors.
    assert ray.get(pair[0].held.remote(label), timeout=30) >= 6
    del references, reference
    eventually(lambda: ray.get(pair[0].held.remote(label), timeout=30) == 0, 60)


def test_tensors_lie_in_memory_of_their_own_and_of_those_before_them_when_these_are_gone(ray, torch, labels, pair):
    sizes = [1 << 18, 3, 1 << 18]

    def got(seed):
        reference = pair[0].make.options(tensor_transport=labels["nixl"]).remote(seed, sizes)
        tensors = ray.get(reference, timeout=60)
        wanted = expected(torch, seed, sizes)
        assert all(torch.equal(one, other) for one, other in zip(tensors, wanted, strict=True))
        # Each has a storage of its own, so that who saves one saves that one.
        assert [each.untyped_storage().nbytes() for each in tensors] == [each.nbytes for each in tensors]
        return tensors

    first, second = got(5), got(6)
    assert first[0].data_ptr() != second[0].data_ptr()
    where, kept = first[0].data_ptr(), first[2]
    del first
    third = got(7)
    assert third[0].data_ptr() != where
    assert torch.equal(kept, expected(torch, 5, sizes)[2])
    del kept
    eventually(lambda: got(8)[0].data_ptr() == where, 30)


@pytest.fixture
def stopped(ray):
    """Stop an actor's process, and know that it is stopped."""
    pids = []

    def stop(pid):
        os.kill(pid, signal.SIGSTOP)
        pids.append(pid)
        eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", 10)

    yield stop
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def test_a_time_out_of_ray_holds_while_the_source_is_stopped_and_not_one_late_byte_reaches_the_caller(
    ray, torch, labels, pair, stopped
):
    sizes = [4 << 20]
    reference = pair[0].make.options(tensor_transport=labels["nixl"]).remote(3, sizes)
    # A later object, so that the connection that knows the earlier one is there, and bytes are what is waited for.
    later = pair[0].make.options(tensor_transport=labels["nixl"]).remote(4, [10])
    assert len(ray.get(later, timeout=60)) == 3
    pid = ray.get(pair[0].pid.remote(), timeout=30)
    wanted = expected(torch, 3, sizes)
    targets = [torch.full_like(each, 5) for each in wanted]
    ray.experimental.set_target_for_ref(reference, targets)
    stopped(pid)
    started = time.monotonic()
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(reference, timeout=1)
    assert time.monotonic() - started < 1 + 5
    os.kill(pid, signal.SIGCONT)
    time.sleep(2)
    assert all(torch.equal(each, torch.full_like(each, 5)) for each in targets)
    ray.get(reference, timeout=60)
    assert all(torch.equal(one, other) for one, other in zip(targets, wanted, strict=True))


def test_a_transfer_that_cannot_end_fails_by_its_own_deadline_and_both_actors_live(ray, torch, labels, pair, stopped):
    reference = pair[0].make.options(tensor_transport=labels["nixl"]).remote(4, [1 << 20])
    pids = ray.get([each.pid.remote() for each in pair], timeout=30)
    ray.wait([reference], timeout=30)
    stopped(pids[0])
    started = time.monotonic()
    with pytest.raises(ray.exceptions.RayTaskError, match="RayDirectTransportError"):
        ray.get(pair[1].digest.remote(reference), timeout=60)
    # Ray's own transport gives up after 60 s.
    assert time.monotonic() - started < 5 * SECONDS
    os.kill(pids[0], signal.SIGCONT)
    assert ray.get([each.pid.remote() for each in pair], timeout=60) == pids
    assert ray.get(pair[1].digest.remote(reference), timeout=60) == summed(expected(torch, 4, [1 << 20]))


def test_an_actor_whose_node_cannot_have_the_transport_is_refused_with_the_reason(ray, labels, pair):
    with pytest.raises(BackendUnavailable, match="rixl"):
        pair[0].make.options(tensor_transport=labels["absent"]).remote(1, [1])


def test_a_name_is_registered_once(ray, labels):
    with pytest.raises(BackendConflict, match="already registered"):
        tensorway_ray.register("tw_nixl", "local")


def test_a_time_that_is_none_is_refused():
    with pytest.raises(SettingInvalid):
        tensorway_ray.register("x", seconds=float("inf"))


# -- the interface


def interface(**changes):
    """A class with Ray's methods and parameters, changed."""
    parameters = {name: ", ".join(given) for name, given in METHODS.items()} | changes
    namespace: dict[str, object] = {}
    for name, given in parameters.items():
        if given is not None:
            exec(f"def {name}({given}): ...", namespace)
    return type("Manager", (), {name: namespace[name] for name in parameters if name in namespace})


def function(transport_name, devices, transport_manager_class, data_type):
    """As Ray's."""


def test_the_interface_of_the_ray_that_is_installed_is_the_one_that_is_known(ray, torch):
    register = ray.experimental.register_tensor_transport
    check("asked", ray.__version__, register, ray.experimental.rdt.TensorTransportManager)
    assert REGISTER == tuple(inspect.signature(register).parameters)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"garbage_collect": "self, obj_id"}, "garbage_collect"),
        ({"abort_transport": None}, "abort_transport"),
        ({"recv_multiple_tensors": "self, obj_id, metadata"}, "recv_multiple_tensors"),
        # What Ray 2.55 has not.
        ({"fetch_multiple_tensors": None, "wait_fetch_complete": None}, "fetch_multiple_tensors, wait_fetch_complete"),
    ],
)
def test_another_interface_is_refused_before_anything_is_registered(changes, says):
    check("asked", "2.60.0", function, interface())
    with pytest.raises(BackendUnavailable, match=f"than Ray 2.60 did: {says}") as refused:
        check("asked", "9.9", function, interface(**changes))
    assert "2.60" in refused.value.to_do


def test_a_ray_without_tensor_transports_of_others_is_refused():
    with pytest.raises(BackendUnavailable, match="has no tensor transports"):
        check("asked", "2.40.0", None, None)
