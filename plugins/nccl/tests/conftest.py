"""Fresh interpreters in which a backend is probed the way the host does it, and stand-ins for what needs a device."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensorway.testing import elsewhere

STANDINS = Path(__file__).parent / "standins"
METADATA = "Metadata-Version: 2.1\nName: tensorway-nccl-standins\nVersion: 0.1.0\n"
ENTRY_POINTS = """\
[tensorway.api]
1 = tensorway_nccl_standins
[tensorway.eplb_communicator]
nccl-over-gloo = tensorway_nccl_standins:over_gloo
nccl-over-a-stand-in = tensorway_nccl_standins:over_a_stand_in
"""


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `nccl` in a process of its own with these folders in front of its path."""
    return partial(elsewhere.probe_elsewhere, "eplb_communicator", "nccl", native=("nvidia",), without=("NCCL_",))


@pytest.fixture
def hide(tmp_path: Path) -> Callable[..., Path]:
    """A folder that hides packages from the interpreters that have it on their path."""
    return partial(elsewhere.hide, tmp_path / "hiding")


@pytest.fixture(scope="session")
def standins(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `PYTHONPATH` has to be for a process to find the stand-ins as an installed dist."""
    folder = tmp_path_factory.mktemp("standins")
    info = folder / "tensorway_nccl_standins-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return os.pathsep.join([str(folder), str(STANDINS)])


@pytest.fixture(scope="session")
def standin_library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library of `standin.c`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("the stand-in for NCCL is written in C; needs a compiler: apt-get install gcc")
    library = tmp_path_factory.mktemp("library") / "libstandin.so"
    command = [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread", "-o", str(library)]
    subprocess.run([*command, str(STANDINS / "standin.c")], check=True, timeout=120)
    return str(library)


@pytest.fixture
def over_a_stand_in(standins: str, standin_library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started now have `nccl-over-a-stand-in`."""
    monkeypatch.setenv("PYTHONPATH", standins)
    monkeypatch.setenv("STANDIN_LIBRARY", standin_library)


@pytest.fixture
def over_gloo(standins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started now have `nccl-over-gloo`."""
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    monkeypatch.setenv("PYTHONPATH", standins)
