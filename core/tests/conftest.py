"""Fixtures of the core's tests: folders of installed dists that never saw pip, and processes that see only these.

What is fake here is the site folder. Metadata is read, modules are imported and processes die for real.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import attrs
import pytest

from tensorway import _logging
from tensorway.plugins import scan
from tensorway.plugins.host import Host
from tensorway.settings import Settings

#: A plugin module whose backend works everywhere.
GOOD = """
from __future__ import annotations
import attrs
from tensorway.types import Offer, ProbeResult

@attrs.frozen
class Options:
    size: int = 1
    name: str = "x"

class Backend:
    def __init__(self, options, context):
        self.options, self.context = options, context
    def close(self):
        pass

def probe():
    return ProbeResult.passed("it works", answer=42)

def {kind}(ctx):
    return Offer(name="{name}", kind="{kind}", summary="A test.", probe=probe, factory=Backend, options=Options,
                 probe_in="{probe_in}", priority={priority})
"""


@attrs.define
class Site:
    """A site folder under construction."""

    path: Path

    def dist(
        self,
        name: str,
        entry_points: Mapping[str, Mapping[str, str]],
        *,
        version: str = "1.0",
        api: str | None = "1",
        folder: str | None = None,
    ) -> Path:
        """Write the metadata of a dist; returns its folder."""
        info = self.path / (folder or f"{name.replace('-', '_')}-{version}.dist-info")
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
        groups = dict(entry_points) | ({"tensorway.api": {api: name.replace("-", "_")}} if api is not None else {})
        lines = [
            line for group, rows in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in rows.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n", "utf-8")
        return info

    def module(self, name: str, source: str) -> None:
        """Write a module."""
        (self.path / f"{name}.py").write_text(textwrap.dedent(source), "utf-8")

    def good(
        self, name: str, kind: str = "transport", *, priority: int = 50, probe_in: str = "host", dist: str = ""
    ) -> None:
        """Write a dist that offers one backend that works."""
        dist = dist or f"{name}-dist"
        module = dist.replace("-", "_")
        self.dist(dist, {f"tensorway.{kind}": {name: f"{module}:{kind}"}})
        self.module(module, GOOD.format(kind=kind, name=name, priority=priority, probe_in=probe_in))

    def bad(self, name: str, source: str, kind: str = "transport") -> None:
        """Write a dist that offers one backend whose module is this."""
        self.dist(f"{name}-dist", {f"tensorway.{kind}": {name: f"{name}_dist:{kind}"}})
        self.module(f"{name}_dist", source)

    def scan(self) -> scan.Scan:
        """What discovery finds here, and only here."""
        return scan.scan(lambda: scan._metadata().distributions(path=[str(self.path)]))

    def host(self, settings: Settings | None = None) -> Host:
        """A host that sees this folder; its modules can be imported as long as the test runs."""
        return Host(self.scan(), settings or Settings())

    def python(self, code: str, *, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run code in a fresh interpreter that finds this folder first."""
        return self.run("-c", textwrap.dedent(code), timeout=timeout, **environment)

    def run(self, *arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENTS` with this folder on the path and nothing of ours in the environment."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("TENSORWAY_", "COLUMNS"))}
        return subprocess.run(
            [sys.executable, *arguments],
            env=kept | {"PYTHONPATH": str(self.path)} | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An empty site folder; what it holds can also be imported in this process."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield Site(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _nothing_has_been_said() -> Iterator[None]:
    _logging.forget()
    yield
    _logging.forget()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set variables for one test."""

    def set_all(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all
