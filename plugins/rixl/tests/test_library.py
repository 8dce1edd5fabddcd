from __future__ import annotations

import pytest

SYMBOLS = """
import json
from tensorway_rixl import library
print(json.dumps([f"{s.__module__}.{s.__name__}" for s in (library.Agent, library.AgentConfig, library.Telemetry)]))
"""
NAMES = ["_api.nixl_agent", "_api.nixl_agent_config", "_bindings.nixlXferTelemetry"]
EXPLAINED = """
import json
from tensorway_rixl.library import LIBRARY
result = LIBRARY.result()
print(json.dumps([result.reason, result.remedy]))
"""
PACKAGE = {
    "__init__.py": "",
    "_api.py": "class nixl_agent: pass\nclass nixl_agent_config: pass\n",
    "_bindings.py": "class nixlXferTelemetry: pass\n",
}
METADATA = {"rixl-9.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: rixl\nVersion: 9.1\n"}


def package(name, *without):
    return {f"{name}/{file}": text for file, text in PACKAGE.items() if file not in without}


def test_importing_the_module_imports_no_library(fresh_python):
    code = """
import json, sys
import tensorway_rixl.library
print(json.dumps([name for name in sys.modules if name.partition("_")[0] in ("nixl", "rixl", "torch", "numpy")]))
"""
    assert [] == fresh_python(code)


def test_nixl_rocm_is_preferred_to_rixl(fresh_python, folder_with):
    both = folder_with(package("nixl_rocm") | package("rixl"))

    assert [f"nixl_rocm.{name}" for name in NAMES] == fresh_python(SYMBOLS, path=(both,))


def test_rixl_is_used_where_there_is_no_nixl_rocm(fresh_python, folder_with):
    assert [f"rixl.{name}" for name in NAMES] == fresh_python(SYMBOLS, path=(folder_with(package("rixl")),))


def test_amds_rixl_counts_even_where_the_impostor_wrote_its_metadata(fresh_python, folder_with, impostor):
    path = (folder_with(package("rixl")), impostor)

    assert [f"rixl.{name}" for name in NAMES] == fresh_python(SYMBOLS, path=path)


def test_the_memory_bound_of_ucx_is_set_before_the_first_load(fresh_python, folder_with):
    bounded = {"rixl/__init__.py": "import os\nassert os.environ['UCX_RCACHE_MAX_UNRELEASED'] == '1024'\n"}

    assert 3 == len(fresh_python(SYMBOLS, path=(folder_with(package("rixl") | bounded),)))


@pytest.mark.parametrize("missing", ["_api", "_bindings"])
def test_a_package_called_rixl_that_lacks_a_part_is_not_amds(fresh_python, folder_with, missing):
    folder = folder_with(package("rixl", f"{missing}.py"))

    reason, remedy = fresh_python(EXPLAINED, path=(folder,))

    assert f"{folder}/rixl/__init__.py is not AMD's rixl: it has no {missing}" == reason
    assert remedy.startswith("Take it off the path, then install AMD's build of nixl_rocm")


def test_a_dist_called_rixl_that_lacks_a_part_is_named_with_its_version(fresh_python, folder_with):
    reason, remedy = fresh_python(EXPLAINED, path=(folder_with(package("rixl", "_bindings.py") | METADATA),))

    assert "the installed rixl 9.1 is not AMD's: it has no rixl._bindings" == reason
    assert remedy.startswith("pip uninstall rixl, then install AMD's build of nixl_rocm")


def test_a_dist_called_rixl_without_such_a_package_is_not_taken_for_a_client_that_it_is_not(fresh_python, folder_with):
    reason, _ = fresh_python(EXPLAINED, path=(folder_with(METADATA),))

    assert "the installed rixl 9.1 is not AMD's: it has no rixl._api" == reason


def test_a_folder_that_happens_to_be_called_rixl_is_no_package(fresh_python, folder_with):
    reason, _ = fresh_python(EXPLAINED, path=(folder_with({"rixl/README.md": ""}),))

    assert "nixl_rocm is not installed; rixl is not installed" == reason


def test_a_build_of_amds_that_does_not_load_is_told_by_its_own_error(fresh_python, folder_with, impostor):
    broken = package("nixl_rocm") | {"nixl_rocm/_bindings.py": "raise ImportError('libamdhip64.so.6: cannot open')"}

    reason, _ = fresh_python(EXPLAINED, path=(folder_with(broken), impostor))

    assert "nixl_rocm is installed but does not load (ImportError: libamdhip64.so.6: cannot open)" in reason
