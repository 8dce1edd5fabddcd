"""Fresh interpreters, the real impostor, and real NIXL under the names that AMD's builds have."""

from __future__ import annotations

import importlib.util
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensorway.testing import elsewhere

#: What tells the impostor from AMD's `rixl`, and nothing else of it.
LOOK_ALIKE = {
    "rixl_client/__init__.py": "raise RuntimeError('the impostor was imported')\n",
    "feeds/__init__.py": "",
    "models/__init__.py": "",
    "rixl-1.3.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: rixl\nVersion: 1.3.0\n",
    "rixl-1.3.0.dist-info/top_level.txt": "feeds\nmodels\nrixl_client\n",
}


@pytest.fixture
def fresh_python() -> Callable[..., Any]:
    """Run code in a new interpreter with folders in front of its path; what its last line says, as JSON."""
    return partial(elsewhere.fresh_python, without=("UCX_", "NIXL_"))


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `rixl` in a process of its own with these folders in front of its path."""
    return partial(
        elsewhere.probe_elsewhere,
        "transport",
        "rixl",
        native=("nixl", "nixl_cu12", "nixl_cu13", "nixl_rocm", "rixl"),
        without=("UCX_", "NIXL_"),
    )


@pytest.fixture
def folder_with(tmp_path: Path) -> Callable[..., Path]:
    """A folder with the given files."""

    def write(files: dict[str, str], name: str = "site") -> Path:
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture(params=["look-alike", "wheel"])
def impostor(request: pytest.FixtureRequest, folder_with: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with the unrelated `rixl` of the public index: what tells it apart, and the real one."""
    if request.param == "look-alike":
        return folder_with(LOOK_ALIKE, "impostor")
    wheel = os.environ.get("TENSORWAY_TEST_IMPOSTOR_WHEEL")
    if not wheel:
        how = "pip download --no-deps rixl==1.3.0, and set TENSORWAY_TEST_IMPOSTOR_WHEEL to the file"
        pytest.skip(f"needs the impostor's wheel, which is never installed: {how}")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "impostor")
    return tmp_path / "impostor"


@pytest.fixture
def posing(tmp_path: Path) -> Callable[[Path, str, str], Path]:
    """A folder in which a real build of NIXL has another name."""

    def pose(site: Path, package: str, name: str) -> Path:
        folder = tmp_path / f"as_{name}"
        shutil.copytree(site / package, folder / name)
        for libraries in (f".{package}.mesonpy.libs", f"{package}.libs"):
            # The extension modules look for them beside the package, under the name that it was built with.
            (folder / libraries).symlink_to(site / libraries)
        return folder

    return pose


@pytest.fixture(scope="session")
def real_nixl() -> tuple[Path, str]:
    """Where a real NIXL is installed and what its package is called; a session that was promised one fails without."""
    found = next((name for name in ("nixl_cu12", "nixl_cu13") if importlib.util.find_spec(name)), None)
    promised = os.environ.get("TENSORWAY_TEST_LIBRARY")
    if found is None and promised == "with":
        pytest.fail("TENSORWAY_TEST_LIBRARY=with, and neither nixl_cu12 nor nixl_cu13 is installed")
    if found is None or promised == "without":
        pytest.skip("needs NIXL itself, to pose as AMD's build: pip install nixl-cu12")
    spec = importlib.util.find_spec(found)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent.parent, found


@pytest.fixture(scope="session")
def older_nixl(real_nixl: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """NIXL of the generation that ROCm forked (1.1), from a wheel."""
    wheel = os.environ.get("TENSORWAY_TEST_OLDER_NIXL_WHEEL")
    if not wheel:
        pytest.skip("needs a wheel of NIXL 1.1: TENSORWAY_TEST_OLDER_NIXL_WHEEL=/path/to/nixl_cu12-1.1.0-...whl")
    folder = tmp_path_factory.mktemp("older")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if ".data/" not in name])
    return folder, Path(wheel).name.partition("-")[0]
