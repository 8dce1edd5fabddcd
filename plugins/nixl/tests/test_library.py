from __future__ import annotations

import pytest

TORCH_VERSION = "from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\nhip = None\n"


def test_importing_the_module_imports_no_nixl(fresh_python):
    code = """
import json, sys
import tensorway_nixl.library
print(json.dumps([name for name in sys.modules if name.partition("_")[0] in ("nixl", "torch", "numpy")]))
"""
    assert [] == fresh_python(code)


def test_the_three_symbols_are_those_of_nixl(fresh_python, real_nixl):
    code = """
import json
from tensorway_nixl import library
print(json.dumps([f"{s.__module__}.{s.__name__}" for s in (library.Agent, library.AgentConfig, library.Telemetry)]))
"""
    wanted = ["_api.nixl_agent", "_api.nixl_agent_config", "_bindings.nixlXferTelemetry"]
    assert [f"{real_nixl}.{name}" for name in wanted] == fresh_python(code)


def test_a_name_that_it_does_not_have_is_an_attribute_error():
    from tensorway_nixl import library

    with pytest.raises(AttributeError, match=r"'tensorway_nixl\.library' has no attribute 'Agnet'"):
        _ = library.Agnet


@pytest.mark.parametrize(
    ("version", "cuda", "first"),
    [
        ("2.13.0+cu126", "12.6", "nixl_cu12"),
        ("2.13.0+cu130", "13.0", "nixl_cu13"),
        ("2.13.0+cpu", None, "nixl_cu13"),
        ("2.13.0", "120.0", "nixl_cu13"),
    ],
)
def test_the_build_for_the_cuda_of_torch_is_tried_first(fresh_python, tmp_path, version, cuda, first):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')")
    (tmp_path / "torch" / "version.py").write_text(TORCH_VERSION.format(version=version, cuda=cuda))
    code = "import json; from tensorway_nixl.library import packages; print(json.dumps(packages()))"

    packages = fresh_python(code, path=(tmp_path,))

    assert first == packages[0]
    assert {"nixl_cu12", "nixl_cu13"} == set(packages)


def test_the_other_build_is_used_when_the_first_does_not_load(fresh_python, fake_nixl):
    folder = fake_nixl()
    (folder / "nixl_cu13" / "_bindings.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    code = "import json; from tensorway_nixl import library; print(json.dumps(library.Agent.__module__))"

    assert "nixl_cu12._api" == fresh_python(code, path=(folder,))


UCX = """
import json, logging, os, sys
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append([record.levelname, record.getMessage()])
logging.getLogger().addHandler(Keep())
if sys.argv[1] == "early":
    import nixl_cu12
from tensorway_nixl import library
before = os.environ.get("UCX_RCACHE_MAX_UNRELEASED")
library.Agent, library.Agent, library.Telemetry
print(json.dumps([before, os.environ["UCX_RCACHE_MAX_UNRELEASED"], lines]))
"""


def test_ucx_is_bounded_before_the_first_load_and_not_by_an_import_of_ours(fresh_python, fake_nixl):
    init = "import os\nassert os.environ['UCX_RCACHE_MAX_UNRELEASED'] == '1024'\n"

    assert [None, "1024", []] == fresh_python(UCX, "late", path=(fake_nixl(init),))


def test_what_the_user_set_for_ucx_stays(fresh_python, fake_nixl):
    path = (fake_nixl(),)
    theirs = {"UCX_RCACHE_MAX_UNRELEASED": "7", "UCX_USE_MT_MUTEX": "n"}

    assert ["7", "7", []] == fresh_python(UCX, "late", path=path, **theirs)
    assert ["7", "7", []] == fresh_python(UCX, "early", path=path, **theirs)


def test_a_library_that_came_first_is_warned_about_once(fresh_python, fake_nixl):
    _, _, lines = fresh_python(UCX, "early", path=(fake_nixl(),))

    assert ["WARNING"] == [level for level, _ in lines]
    assert "NIXL was imported (as nixl_cu12) before" in lines[0][1]
    assert "UCX_RCACHE_MAX_UNRELEASED=1024, UCX_USE_MT_MUTEX=y" in lines[0][1]


def test_absence_is_found_out_once_and_again_when_it_is_forgotten(fresh_python, hide):
    code = """
import json, sys
from tensorway import native
from tensorway.errors import BackendUnavailable
from tensorway_nixl import library

asked = []
class Counting:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("nixl"):
            asked.append(name)
sys.meta_path.insert(0, Counting())
def ask():
    try:
        library.Agent
    except BackendUnavailable as error:
        return str(error)
texts = [ask() for _ in range(3)]
once = len(asked)
native.forget_failures()
ask()
print(json.dumps([texts, once, len(asked)]))
"""
    texts, once, twice = fresh_python(code, path=(hide("nixl_cu12", "nixl_cu13"),))

    lines = [
        "NIXL was asked for 'Agent'.",
        "  NIXL cannot be loaded: nixl_cu13 is not installed; nixl_cu12 is not installed.",
        '  pip install "tensorway[nixl]"',
    ]
    assert 3 * ["\n".join(lines)] == texts
    assert (2, 4) == (once, twice)


def test_what_was_installed_after_a_failure_is_found_once_that_is_forgotten(fresh_python, fake_nixl, hide):
    code = """
import json, sys
from tensorway import native
from tensorway_nixl import library
missing = type(library.LIBRARY.result()).__name__
sys.meta_path[:] = [getattr(finder, "finder", finder) for finder in sys.meta_path]   # what hid it goes
remembered = type(library.LIBRARY.result()).__name__
native.forget_failures()
print(json.dumps([missing, remembered, type(library.LIBRARY.result()).__name__]))
"""
    path = (hide("nixl_cu12", "nixl_cu13"), fake_nixl())

    assert ["Absent", "Absent", "Loaded"] == fresh_python(code, path=path)


@pytest.mark.parametrize(("present", "looks"), [(True, 2), (False, 1)])
def test_eight_threads_at_once_load_it_once(fresh_python, fake_nixl, hide, present, looks):
    code = """
import json, sys, threading, time
from tensorway_nixl import library
asked = []
class SlowAndCounting:
    def find_spec(self, name, path=None, target=None):
        if name == "nixl_cu13":
            asked.append(name)
            time.sleep(0.2)
sys.meta_path.insert(0, SlowAndCounting())
start, found = threading.Barrier(8), []
def ask():
    start.wait()
    found.append(library.LIBRARY.result())
threads = [threading.Thread(target=ask) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([len(found), len({id(result) for result in found}), len(asked)]))
"""
    # A package that is there is looked for twice: to see whether it is, and by the import itself.
    path = (fake_nixl(),) if present else (hide("nixl_cu12", "nixl_cu13"),)

    assert [8, 1, looks] == fresh_python(code, path=path)


def test_the_applications_logging_survives_the_import_of_nixl(fresh_python, real_nixl, tmp_path):
    code = """
import json, logging, sys
log, handler = logging.getLogger("app"), logging.FileHandler(sys.argv[1], mode="w")
log.addHandler(handler)
log.warning("before")
from tensorway_nixl import library
library.Agent
log.warning("after")
handler.flush()
print(json.dumps([open(sys.argv[1]).read().split(), logging.raiseExceptions, logging.getLogger().handlers]))
"""
    assert [["before", "after"], True, []] == fresh_python(code, str(tmp_path / "app.log"))
