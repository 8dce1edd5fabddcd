"""NIXL missing, present, broken, aborting, and the impostor `rixl`: what an operator sees of each.

The environments are real: a fresh venv with the core and two plugins and no library; this interpreter's own NIXL; the
dist from the public index that happens to be called `rixl`. Only the breakage is made: a NIXL that raises or dies at
import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

OK, BROKEN, UNAVAILABLE = 0, 1, 3

IMPOSTOR = "rixl==1.3.0"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a venv that has the core, `nixl` and `rixl`, and neither library."""
    house = os.environ.get("TENSORWAY_TEST_WHEELHOUSE")
    if house is None:
        pytest.skip("needs built wheels: run nox -s everything, or set TENSORWAY_TEST_WHEELHOUSE to a folder of them")
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    wheels = [
        str(next(Path(house).glob(f"{dist}-*.whl"))) for dist in ("tensorway", "tensorway_nixl", "tensorway_rixl")
    ]
    subprocess.run([python, "-m", "pip", "install", "-q", *wheels], check=True, timeout=300)
    return python


def tensorway(python: Path | str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in an environment; there is never a traceback."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TENSORWAY_", "PYTHON"))}
    done = subprocess.run(
        [str(python), "-m", "tensorway", *arguments],
        env=kept | ({"PYTHONPATH": str(path)} if path else {}),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


def seen(python: Path | str, backend: str, path: Path | None = None) -> tuple[dict[str, str], int]:
    """The record of one backend, and the exit code of asking for it."""
    done = tensorway(python, "doctor", "--backend", backend, "--json", path=path)
    (row,) = json.loads(done.stdout)["plugins"]
    assert "\n" not in row["reason"]
    return row, done.returncode


def broken_nixl(tmp_path: Path, source: str) -> Path:
    for name in ("nixl_cu12", "nixl_cu13"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source, "utf-8")
    return tmp_path


def test_missing(bare):
    row, code = seen(bare, "nixl")
    assert (UNAVAILABLE, "unusable") == (code, row["code"])
    assert "NIXL cannot be loaded: nixl_cu13 is not installed; nixl_cu12 is not installed" == row["reason"]
    assert 'pip install "tensorway[nixl]"' == row["remedy"]
    assert OK == tensorway(bare, "doctor").returncode, "what is merely missing is not broken"


def test_present():
    if find_spec("nixl_cu12") is None:
        pytest.skip("needs NIXL: pip install nixl-cu12==1.5.1 -c constraints.txt, or run nox -s everything")
    row, code = seen(sys.executable, "nixl")
    assert (OK, "", "usable") == (code, row["code"], row["state"])
    assert row["probe"]["reason"].startswith("NIXL 1.5.1 (nixl_cu12) read its own memory through UCX")


def test_broken(bare, tmp_path):
    source = "raise OSError('libcudart.so.12: cannot open shared object file: No such file or directory')"
    row, code = seen(bare, "nixl", broken_nixl(tmp_path, source))
    assert (UNAVAILABLE, "unusable") == (code, row["code"])
    assert "installed but does not load (OSError: libcudart.so.12: cannot open shared object file" in row["reason"]
    assert "force-reinstall" in row["remedy"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL (an instruction that this CPU lacks)"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV (a bad memory access)"),
    ],
)
def test_aborting(bare, tmp_path, source, words):
    path = broken_nixl(tmp_path, source)
    row, code = seen(bare, "nixl", path)
    assert (UNAVAILABLE, "probe-aborted", True) == (code, row["code"], words in row["reason"])
    assert BROKEN == tensorway(bare, "doctor", path=path).returncode


def test_impostor(bare, tmp_path):
    command = [str(bare), "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), IMPOSTOR]
    subprocess.run(command, check=True, timeout=300)
    with zipfile.ZipFile(next(tmp_path.glob("rixl-*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    row, code = seen(bare, "rixl", tmp_path / "site")
    assert (UNAVAILABLE, "unusable") == (code, row["code"])
    assert "the installed rixl 1.3.0 is an unrelated client of a web service" in row["reason"]
    assert row["remedy"].startswith("pip uninstall rixl")
