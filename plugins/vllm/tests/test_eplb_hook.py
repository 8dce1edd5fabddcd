"""What is put around vLLM's expert balancing, and when it is refused: on vLLM's real modules, altered where it must be.

A vLLM that differs cannot be had on request, so names of the one that is here are exchanged for others.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from types import SimpleNamespace

import pytest

from tensorway.errors import Incompatible, OptionsInvalid

with warnings.catch_warnings():  # those of importing vLLM are not ours
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm.distributed.eplb.eplb_state", reason="needs vLLM", exc_type=ImportError)
    import torch
    from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed.eplb import eplb_communicator, eplb_state

from tensorway_vllm.eplb import expected
from tensorway_vllm.eplb.hook import attach
from tensorway_vllm.eplb.meeting import Meeting
from tensorway_vllm.eplb.options import EplbOptions
from tensorway_vllm.plugin import register

pytestmark = pytest.mark.timeout(300)
OURS = {"tensorway": {"eplb": {"communicator": "onesided", "policy": "incremental"}}}


@pytest.fixture(autouse=True)
def events(monkeypatch):
    """A state of vLLM 0.30 has one of CUDA's, whatever there is; later ones have torch's."""
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: None)


@pytest.fixture
def configured():
    """Run something as a worker of vLLM does, with a config that has this in `additional_config`."""

    def run(additional, act):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = VllmConfig(additional_config=additional)
        with set_current_vllm_config(config):
            return act()

    return run


def state():
    return eplb_state.EplbState(ParallelConfig(), torch.device("cpu"))


def create(*given, **named):
    return eplb_state.create_eplb_communicator(*given, **named)


@pytest.fixture
def fresh(monkeypatch):
    """vLLM's module as it is imported, with nothing around it; and as it was afterwards."""
    monkeypatch.setattr(eplb_state.EplbState, "__init__", inspect.unwrap(eplb_state.EplbState.__init__))
    monkeypatch.setattr(eplb_state, "create_eplb_communicator", eplb_communicator.create_eplb_communicator)
    monkeypatch.setattr(eplb_state, "EPLB_POLICIES", dict(eplb_state.EPLB_POLICIES))
    monkeypatch.setattr(eplb_state, "tensorway_around", None, raising=False)
    return monkeypatch


def names():
    return eplb_state.EplbState.__init__, eplb_state.create_eplb_communicator, eplb_state.EPLB_POLICIES


def test_the_vllm_that_is_installed_is_as_expected():
    assert not [each for each in expected.looks() if not each.good]
    expected.check()


def test_a_second_load_changes_nothing(fresh):
    register()
    first = names()
    assert eplb_communicator.create_eplb_communicator is not first[1]
    register()
    attach(eplb_state)
    assert all(before is after for before, after in zip(first, names(), strict=True))


def test_a_module_that_is_reloaded_is_seen_again(configured):
    register()
    before = names()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.reload(eplb_state)
    assert all(old is not new for old, new in zip(before, names(), strict=True))
    assert all(hasattr(each, "__wrapped__") for each in names()[:2])
    with pytest.raises(OptionsInvalid, match="polcy"):
        configured({"tensorway": {"eplb": {"polcy": "incremental"}}}, state)


def test_a_module_that_is_imported_later_is_seen_when_it_is(fresh):
    """As in vLLM's workers: plugins are loaded first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh.setattr(sys.modules["vllm.distributed.eplb"], "eplb_state", eplb_state)  # to be that again
        fresh.delitem(sys.modules, expected.STATE)
        register()
        found = importlib.import_module(expected.STATE)
    assert found is not eplb_state and hasattr(found.create_eplb_communicator, "__wrapped__")


@pytest.mark.parametrize("additional", [{}, {"somebody": {"eplb": {"communicator": "x"}}}, {"tensorway": {}}])
def test_who_does_not_ask_gets_vllm_own_with_its_own_arguments(fresh, configured, additional):
    called = []
    fresh.setattr(eplb_state, "create_eplb_communicator", lambda *given, **named: called.append((given, named)))
    attach(eplb_state)
    configured(additional, state)
    configured(additional, lambda: create(1, "two", of="vLLM"))
    assert [((1, "two"), {"of": "vLLM"})] == called
    policy = configured(additional, lambda: eplb_state.EPLB_POLICIES["default"])
    assert "DefaultEplbPolicy" == policy.__name__
    with pytest.raises(KeyError):
        configured(additional, lambda: eplb_state.EPLB_POLICIES["other"])


@pytest.mark.parametrize(
    ("additional", "near"),
    [
        ({"tensorwai": {"eplb": {"policy": "incremental"}}}, "'tensorway'"),
        ({"tensorway": {"elpb": {"policy": "incremental"}}}, "'eplb'"),
        ({"tensorway": {"eplb": {"polici": "incremental"}}}, "'policy'"),
    ],
)
def test_a_misspelt_key_is_refused_before_weights_are_loaded(fresh, configured, additional, near):
    attach(eplb_state)
    with pytest.raises(OptionsInvalid, match=f"Did you mean {near}"):
        configured(additional, state)


class More(eplb_communicator.EplbCommunicator):
    """vLLM's, with a question more."""

    def add_all(self):
        """What ours has no answer to."""


def other_create(coordinator, expert_weights):
    """vLLM's, with other parameters."""


def deaf_add_model(self, model, model_config):
    """vLLM's, that makes communicators in another way."""


STATE, COMMUNICATOR = eplb_state.__name__, eplb_communicator.__name__
FACTORY = f"{STATE}.create_eplb_communicator"
ALTERED = {
    "parameters of the factory": (FACTORY, other_create, "create_eplb_communicator()"),
    "no factory": (FACTORY, None, "create_eplb_communicator()"),
    "another way to make it": (f"{STATE}.EplbState.add_model", deaf_add_model, "EplbState.add_model"),
    "more to answer": (f"{COMMUNICATOR}.EplbCommunicator", More, "EplbCommunicator: it has no"),
    "policies of another kind": (f"{STATE}.EPLB_POLICIES", [], "EPLB_POLICIES"),
}


@pytest.mark.parametrize(("name", "instead", "said"), ALTERED.values(), ids=ALTERED)
def test_who_asks_of_a_vllm_that_differs_is_refused_and_who_does_not_never_notices(
    fresh, configured, name, instead, said
):
    if instead is None:
        fresh.delattr(name)
    else:
        fresh.setattr(name, instead)
    attach(eplb_state)
    with pytest.raises(Incompatible) as refused:
        configured(OURS, state)
    assert said in refused.value.true and "tensorway vllm doctor" in refused.value.to_do
    configured({}, state)


def test_a_communicator_that_is_made_without_a_state_is_checked_as_well(fresh, configured):
    """As for a group that changes its size."""
    fresh.setattr(eplb_communicator, "EplbCommunicator", More)
    attach(eplb_state)
    with pytest.raises(Incompatible):
        configured(OURS, lambda: create(None, "torch_gloo", [], []))


def test_a_vllm_without_expert_balancing_says_so_once(fresh, caplog):
    fresh.delattr(eplb_state, "EplbState")
    fresh.delattr(eplb_state, "create_eplb_communicator")
    attach(eplb_state)
    assert "tensorway vllm doctor" in caplog.text


@pytest.mark.parametrize(("policy", "where"), [("loopback", "127.0.0.1:"), ("", "")])
def test_ranks_of_several_hosts_meet_where_the_deployment_says(monkeypatch, policy, where):
    monkeypatch.setenv("TENSORWAY_HOST", policy)
    # That of another host. vLLM may have read its variable before, and keeps what it has read.
    monkeypatch.setattr("vllm.utils.network_utils.get_ip", lambda: "192.0.2.1")
    coordinator = SimpleNamespace(cpu_group=None, rank_in_group=0, world_size=2)
    place, own = Meeting(coordinator, EplbOptions(communicator="onesided"), "cpu")._opened(one_host=False)
    assert (where, bool(own)) == (place.address[: len(where)], bool(where))
    assert bool(own) or "192.0.2.1" in place.why
    if own is not None:
        own.close()
