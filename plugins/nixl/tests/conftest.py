"""Fresh interpreters, and stand-ins for NIXL in the state that a test is about."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensorway.testing import elsewhere

PACKAGES = ("nixl_cu12", "nixl_cu13")

#: The shape of NIXL with which an agent moves bytes by memmove; `{state}` is what a transfer ends in.
FAKE_API = """
import ctypes
class nixl_agent_config:
    def __init__(self, enable_prog_thread=True, backends=("UCX",)):
        self.backends = backends
class nixl_agent:
    def __init__(self, name, config):
        self.name = name
    def create_backend(self, name, params):
        self.params = params
    def register_memory(self, regions, kind):
        return regions
    def get_xfer_descs(self, descs, kind):
        return descs
    def initialize_xfer(self, operation, ours, theirs, peer):
        return ours[0], theirs[0]
    def transfer(self, handle):
        (target, nbytes, _), (source, _, _) = handle
        if {copies}:
            ctypes.memmove(target, source, nbytes)
        return "{state}"
    check_xfer_state = transfer
    def release_xfer_handle(self, handle):
        pass
    deregister_memory = release_xfer_handle
"""


@pytest.fixture
def fresh_python() -> Callable[..., Any]:
    """Run code in a new interpreter with folders in front of its path; what its last line says, as JSON."""
    return partial(elsewhere.fresh_python, without=("UCX_", "NIXL_"))


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `nixl` in a process of its own with these folders in front of its path."""
    return partial(
        elsewhere.probe_elsewhere,
        "transport",
        "nixl",
        native=("nixl", "nixl_cu12", "nixl_cu13"),
        without=("UCX_", "NIXL_"),
    )


@pytest.fixture
def hide(tmp_path: Path) -> Callable[..., Path]:
    """A folder that hides packages from the interpreters that have it on their path."""
    return partial(elsewhere.hide, tmp_path / "hiding")


@pytest.fixture
def fake_nixl(tmp_path: Path) -> Callable[..., Path]:
    """A folder with both of NIXL's packages, made of the code that a test gives."""

    def write(init: str = "", api: str | None = None, state: str = "DONE", copies: bool = True) -> Path:
        folder = tmp_path / "fake"
        for name in PACKAGES:
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").write_text(init)
            text = FAKE_API.format(state=state, copies=copies) if api is None else api
            (folder / name / "_api.py").write_text(text)
            (folder / name / "_bindings.py").write_text("class nixlXferTelemetry: pass\n")
        return folder

    return write


@pytest.fixture(scope="session")
def real_nixl() -> str:
    """The name of the NIXL package that is installed; a session that was promised one fails without it."""
    found = next((name for name in PACKAGES if importlib.util.find_spec(name)), None)
    promised = os.environ.get("TENSORWAY_TEST_LIBRARY")
    if found is None and promised == "with":
        pytest.fail("TENSORWAY_TEST_LIBRARY=with, and neither nixl_cu12 nor nixl_cu13 is installed")
    if found is None or promised == "without":
        pytest.skip("needs NIXL itself: pip install nixl-cu12")
    return found
