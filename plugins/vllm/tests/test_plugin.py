"""What vLLM calls at start; factories of its are imitated."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from tensorway.errors import OptionsInvalid
from tensorway_vllm import plugin
from tensorway_vllm.offloading.options import options_of
from tensorway_vllm.plugin import needed, register


class Factory:
    """Refuses a name that it has, and keeps a function that knows where the class is, as vLLM's do."""

    def __init__(self):
        self._registry = {}

    def register_connector(self, name, module, cls):
        if name in self._registry:
            raise ValueError(name)
        self._registry[name] = lambda: (module, cls)

    register_spec = register_connector

    def told(self):
        return {name: loader()[0] for name, loader in self._registry.items()}


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch):
    monkeypatch.setattr(plugin, "_said", set())
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])


@pytest.fixture
def factories(monkeypatch):
    made = {}
    for path, name in (
        ("vllm.distributed.kv_transfer.kv_connector.factory", "KVConnectorFactory"),
        ("vllm.v1.kv_offload.factory", "OffloadingSpecFactory"),
    ):
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            module = ModuleType(package)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, package, sys.modules.get(package, module))
        made[name] = Factory()
        monkeypatch.setattr(sys.modules[path], name, made[name], raising=False)
    return made


def test_names_are_registered_once(factories, caplog):
    register()
    register()
    assert factories["KVConnectorFactory"].told() == {
        "TensorwayConnector": "tensorway_vllm.handover",
        "TensorwayOffloadingConnector": "tensorway_vllm.offloading.connector",
    }
    assert not caplog.text, "vLLM's factories refuse what they have"
    assert factories["OffloadingSpecFactory"].told() == {"TensorwayOffloadingSpec": "tensorway_vllm.offloading.spec"}


def test_factories_that_come_later_are_told_when_they_do(tmp_path):
    """In a process of its own, for it is about what was imported."""
    for path in ("vllm/distributed/kv_transfer/kv_connector", "vllm/v1/kv_offload"):
        (tmp_path / path).mkdir(parents=True)
    for folder in (each for each in (tmp_path / "vllm", *(tmp_path / "vllm").rglob("*")) if each.is_dir()):
        (folder / "__init__.py").touch()  # or the real one would be found first
    factory = (
        "class {0}:\n    _registry = {{}}\n    @classmethod\n    def {1}(cls, *told): cls._registry[told[0]] = told\n"
    )
    connectors = tmp_path / "vllm/distributed/kv_transfer/kv_connector/factory.py"
    connectors.write_text(factory.format("KVConnectorFactory", "register_connector"))
    (tmp_path / "vllm/v1/kv_offload/factory.py").write_text(factory.format("OffloadingSpecFactory", "register_spec"))
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from tensorway_vllm import plugin
from tensorway_vllm.plugin import needed, register
register()
register()
assert not [name for name in sys.modules if name.startswith("vllm")]
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.kv_offload.factory import OffloadingSpecFactory
print(sorted([*KVConnectorFactory._registry, *OffloadingSpecFactory._registry]))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "['TensorwayConnector', 'TensorwayOffloadingConnector', 'TensorwayOffloadingSpec']\n", done


def test_factories_that_are_others_do_not_end_the_engine(factories, monkeypatch, caplog):
    monkeypatch.delattr(Factory, "register_connector")
    register()
    register()
    [line] = caplog.messages
    assert "KVConnectorFactory" in line or "kv_connector.factory" in line
    assert "tensorway vllm doctor" in line


def test_a_name_that_somebody_else_has_is_said_once_with_what_to_do(factories, caplog):
    factories["KVConnectorFactory"].register_connector("TensorwayConnector", "somebody.else", "TensorwayConnector")
    register()
    register()
    [line] = caplog.messages
    assert "TensorwayConnector" in line and "tensorway_vllm.handover" in line
    assert factories["KVConnectorFactory"].told()["TensorwayConnector"] == "somebody.else", "theirs stays"


def test_an_operator_who_registers_ours_is_nobody_else(factories, caplog):
    factories["KVConnectorFactory"].register_connector("TensorwayConnector", "tensorway_vllm.handover", "Any")
    register()
    assert not caplog.messages


def test_a_class_that_is_used_without_the_plugin_registers_all_names_and_says_why(factories, caplog, monkeypatch):
    environment = ModuleType("vllm.envs")
    environment.VLLM_PLUGINS = ["lora_resolver", "other"]
    monkeypatch.setitem(sys.modules, "vllm.envs", environment)
    needed("TensorwayConnector")
    needed("TensorwayConnector")
    [line] = caplog.messages
    assert "VLLM_PLUGINS (lora_resolver,other)" in line and "Add tensorway to VLLM_PLUGINS" in line
    assert "TensorwayOffloadingConnector" in factories["KVConnectorFactory"].told()


def test_a_class_that_is_used_with_the_plugin_says_nothing(factories, caplog):
    register()
    needed("TensorwayConnector")
    assert not caplog.messages


def test_the_entry_point_costs_less_than_ten_milliseconds_of_a_processor():
    """In processes of their own, of which the fastest counts: a busy machine makes the others slower."""
    code = (
        # What every process of vLLM has long since imported.
        "import importlib.abc, logging, time, typing; from importlib.metadata import entry_points; "
        "[ours] = [each for each in entry_points(group='vllm.general_plugins') if each.name == 'tensorway']; "
        "began = time.process_time(); ours.load()(); ours.load()(); print(time.process_time() - began)"
    )
    tried = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    assert min(tried) < 0.010, tried


@pytest.mark.parametrize(
    "module",
    [
        "plugin",
        "probes",
        "versions",
        "counting",
        "command",
        "offloading.options",
        "offloading.pages",
        "handover.options",
    ],
)
def test_nothing_of_vllm_is_imported_before_it_is_needed(module):
    code = (
        f"import sys, tensorway_vllm.{module}; sys.exit(any(m.split('.')[0] in ('vllm', 'torch') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_misspelt_option_is_an_error_with_the_nearest_name():
    with pytest.raises(OptionsInvalid, match="flush_seconds"):
        options_of({"flush_secnds": 3})


def test_options_that_vllm_reads_are_known():
    options = options_of({"spec_name": "TensorwayOffloadingSpec", "blocks_per_chunk": 2, "options": {"threads": 1}})
    assert (options.backend, options.options, options.blocks_per_chunk) == ("cpu", {"threads": 1}, 2)
