"""Each message on docs/vllm-troubleshooting.md is one that the real vLLM, or ours in it, says. Needs vLLM.

What differs from machine to machine is `...` on the page. Nothing here starts an engine that computes.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest

import tensorway

PAGE = Path(__file__).parents[3] / "docs" / "vllm-troubleshooting.md"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.skipif(not PAGE.is_file(), reason="the pages are in the checkout, and this is not one"),
    pytest.mark.timeout(300),
]
SECRET = "the same everywhere on this page"


def messages():
    """Heading -> the text blocks of its section."""
    found = {}
    for part in re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        if blocks := re.findall(r"^```text\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE):
            found[title] = blocks
    return found


def matches(expected, actual):
    """Whether a message is as shown: `...` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in expected.split("..."))
    return re.fullmatch(pattern, actual.strip(), re.DOTALL) is not None


@pytest.fixture(scope="module", autouse=True)
def imported():
    """vLLM, whose warnings at import are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm.config
        import vllm.distributed.kv_transfer.kv_connector.factory
        import vllm.distributed.kv_transfer.kv_connector.v1.multi_connector
        import vllm.v1.core.kv_cache_utils  # noqa: F401

        import tensorway_vllm.handover
        import tensorway_vllm.offloading.connector
        import tensorway_vllm.offloading.spec  # noqa: F401


def said(error):
    """As an operator reads it, at the end of a traceback."""
    return f"{type(error).__name__}: {error}"


def raised(call, *given, **named):
    """What a call raises."""
    with pytest.raises(Exception) as caught:
        call(*given, **named)
    return said(caught.value)


# -- one function for each section, which yields the messages in the order of the page


def unsupported_connector():
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    config = KVTransferConfig(kv_connector="TensorwayConnector", kv_role="kv_both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVConnectorFactory, "_registry", {})
        yield raised(KVConnectorFactory.get_connector_class, config)


def misspelt():
    from vllm.config import KVTransferConfig

    from tensorway_vllm.handover.options import options_of as of_handover
    from tensorway_vllm.offloading.options import options_of as of_offloading

    yield raised(of_offloading, {"optoins": {"capacity_bytes": 1 << 30}})
    yield raised(of_handover, {"options": {"transport": "nixl"}})
    yield raised(KVTransferConfig, kv_conector="TensorwayConnector", kv_role="kv_both").partition(" [type=")[0]


def wrong_backend():
    from tensorway_vllm.handover.options import check, options_of

    wrong = options_of({"rendezvous": "direct", "options": {"transprot": "nixl"}})
    yield raised(check, wrong, "decode", memory=False)
    wrong = options_of({"rendezvous": "zookeeper"})
    yield raised(check, wrong, "decode", memory=False)


def load_failures(heard, engine):
    for kv in (OFFLOADING, HANDING_OVER):
        heard.clear()
        with engine(kv):
            yield one_of(heard, "kv_load_failure_policy")


def rendezvous_refuses():
    with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as service:
        wrong = {"address": service.address, "secret": "another everywhere on this page"}
        with tensorway.create("rendezvous", "direct", wrong) as client:
            yield raised(client.get, "/kv")
        port = int(service.address.rpartition(":")[2])
        yield raised(tensorway.create, "rendezvous", "direct", {"secret": SECRET, "port": port})
    with tensorway.create("rendezvous", "direct", {"address": f"127.0.0.1:{port}", "secret": SECRET}) as client:
        yield raised(client.get, "/kv", deadline=0.3)


def restarts(heard):
    from vllm.utils.hashing import xxhash
    from vllm.v1.core.kv_cache_utils import init_none_hash

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONHASHSEED", raising=False)
        init_none_hash(xxhash)
    yield one_of(heard, "PYTHONHASHSEED")


def refused_models():
    from tensorway_vllm.handover.memory import _check_parallel, _kind

    class MambaSpec:
        """What vLLM calls a state."""

    yield raised(_kind, MambaSpec(), "model.layers.0.mixer")
    sizes = {"pipeline_parallel_size": 2, "prefill_context_parallel_size": 1, "decode_context_parallel_size": 1}
    yield raised(_check_parallel, SimpleNamespace(**sizes))


def memory_and_folders(tmp_path):
    from tensorway.errors import TensorwayError

    context = attrs.evolve(offload_context(), engine=f"of this page {tmp_path.name}")
    with pytest.raises(TensorwayError) as caught:
        tensorway.create("offloading", "cpu", {"capacity_bytes": 1 << 60, "populate": True}, context)
    yield said(caught.value)
    missing = {"backend": "fs", "options": {"folder": "/var/cache/tensorway"}}
    with pytest.raises(TensorwayError) as caught:
        tensorway.create("offloading", "cpu", {"capacity_bytes": 1 << 20, "tiers": [missing]}, context)
    yield said(caught.value)


def multi():
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    child = {"kv_connector": "TensorwayConnector", "kv_role": "kv_both", "engine_id": "prefill-0"}
    parent = SimpleNamespace(engine_id="prefill-0", kv_connector_extra_config={"connectors": [child]})
    yield raised(MultiConnector._get_connector_classes_and_configs, SimpleNamespace(kv_transfer_config=parent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVConnectorFactory, "_registry", {})
        yield raised(KVConnectorFactory.get_connector_class_by_name, "TensorwayConnector")


def no_guard(tmp_path):
    script = tmp_path / "starts.py"
    text = "from multiprocessing import get_context\nget_context('spawn').Process(target=print).start()\n"
    script.write_text(text, "utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    (found,) = re.findall(r"RuntimeError:\s+(An attempt .*?)\n\s*\n", done.stderr, re.DOTALL)
    yield " ".join(found.split())


def no_metadata():
    if importlib.util.find_spec("vllm") and "vllm" in {each.name for each in metadata.distributions()}:
        pytest.skip("vLLM is here by its own name")
    yield raised(metadata.version, "vllm")


def computed(heard, model):
    """Two engines whose operators say of their weights that they differ."""
    from tensorway_vllm.testing.scheduling import WISH, Engine, Meeting, until

    meeting, engines = Meeting(), []
    try:
        for name in ("prefill-0", "decode-0"):
            kv = meeting.config(name)
            kv["kv_connector_extra_config"]["facts"] = {"weights": f"those of {name}"}
            engines.append(Engine(model, kv))
        prefill, decode = engines
        prompt = range(4, 100)
        (first,) = prefill.run(prefill.add(prompt, 1, WISH))
        name = decode.add(prompt, 2, first.params)
        until(lambda: decode.said[name].reason, prefill, decode)
        assert len(decode.said[name].tokens) == 2
        yield one_of(heard, "did not come, and are computed")
    finally:
        for each in reversed(engines):
            each.close()
        meeting.close()


def another_vllm():
    from tensorway_vllm import probes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "version", lambda: "0.29.1")
        yield raised(probes.check_offloading)


def by_its_module(heard):
    from tensorway_vllm import plugin

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "_registered", False)
        patch.setattr(plugin, "_said", set())
        patch.setattr("vllm.envs.VLLM_PLUGINS", ["others"], raising=False)
        plugin.needed("TensorwayConnector")
    yield one_of(heard, "by its module's path")


def experts():
    from vllm.config.parallel import EPLBConfig

    yield raised(EPLBConfig, communicator="onesided").partition(" [type=")[0]


SECTIONS = {
    "vLLM does not know the connector": unsupported_connector,
    "A key of the configuration is not known": misspelt,
    "A backend is not there, or does not know an option": wrong_backend,
    "Requests fail where their blocks do not come": load_failures,
    "The rendezvous does not let engines in": rendezvous_refuses,
    "Nothing is found after a restart": restarts,
    "The model is refused": refused_models,
    "Memory or a folder is refused": memory_and_folders,
    "MultiConnector ends at the start": multi,
    "A script starts its engine again and again": no_guard,
    "vllm serve ends at once on a machine without accelerators": no_metadata,
    "A communicator of experts is refused": experts,
    "A class was found by its module's path": by_its_module,
    "Engines do not hand over to each other": computed,
    "vLLM is another one than was tried": another_vllm,
}


# -- what they need


OFFLOADING = {
    "kv_connector": "TensorwayOffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"options": {"capacity_bytes": 1 << 20}},
}
HANDING_OVER = {
    "kv_connector": "TensorwayConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "rendezvous": "direct",
        "rendezvous_options": {"secret": SECRET},
        "options": {"transport": "local", "secret": SECRET},
    },
}


def one_of(caplog, word):
    """What was logged with a word in it, once or more often."""
    (message,) = {each.getMessage() for each in caplog.records if word in each.getMessage()}
    return message


def offload_context():
    """An engine with one layer in memory of the host."""
    from tensorway.geometry import Group, Part, Plane, RankGeometry
    from tensorway.offload import OffloadContext

    plane = Plane("layer", 0, 4096, 4096, 4096, 1, (Part(0, "page", 0, 16, 256, 0, 1, 256, 256),), "cpu")
    ranks = [RankGeometry((plane,), (Group(16),))]
    return OffloadContext(engine="page", role="manager", ranks=ranks, pages_per_block=1, facts={}, deadline=10.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tensorway_vllm.testing.tiny import make

    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(model):
    """vLLM's engine core with one of our connectors, and no model to compute."""

    @contextmanager
    def started(kv):
        from tensorway_vllm.testing.scheduling import Engine

        core = Engine(model, kv)
        try:
            yield core
        finally:
            core.close()

    return started


@pytest.fixture
def heard(caplog):
    """vLLM's log and ours, which go past pytest's otherwise."""
    loggers = [logging.getLogger(name) for name in ("vllm", "tensorway")]
    before = [(each, each.propagate) for each in loggers]
    for each in loggers:
        each.propagate = True
    with caplog.at_level(logging.WARNING):
        yield caplog
    for each, propagate in before:
        each.propagate = propagate


@pytest.mark.parametrize("title", SECTIONS)
def test_the_page_shows_what_is_said(title, request, heard):
    function = SECTIONS[title]
    names = inspect.signature(function).parameters
    found = list(function(**{name: request.getfixturevalue(name) for name in names}))
    shown = messages()[title]
    assert len(shown) == len(found), found
    for expected, actual in zip(shown, found, strict=True):
        assert matches(expected, actual), f"\non the page:\n{expected}\nsaid:\n{actual}"


def test_every_message_on_the_page_is_compared():
    assert set(messages()) == set(SECTIONS)


def test_the_logging_configuration_on_the_page_lets_tensorway_be_heard(tmp_path):
    (shown,) = re.findall(r"^```json\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "logging.json").write_text(shown, "utf-8")
    said_by = "for name, word in (('tensorway.vllm', 'heard'), ('vllm', 'too')): logging.getLogger(name).info(word)"
    text = f"import logging, vllm.logger\nvllm.logger._configure_vllm_root_logger()\n{said_by}"
    command = [
        "env",
        f"VLLM_LOGGING_CONFIG_PATH={tmp_path / 'logging.json'}",
        sys.executable,
        "-W",
        "ignore",
        "-c",
        text,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert re.search(r"^INFO \S+ \S+ tensorway\.vllm: heard$", done.stderr, re.MULTILINE), done.stderr
    assert re.search(r"^INFO \S+ \S+ vllm: too$", done.stderr, re.MULTILINE), done.stderr
