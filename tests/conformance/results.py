"""Checks every backend of ours with `tensorway check`, keeps the reports below docs/, and makes the table of them.

`nox -s conformance` runs it in an environment with all libraries; `python tests/conformance/results.py table` only
makes the table anew from the reports that are there. What cannot be checked here is in `LEFT_OUT`, with its reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import attrs

from tensorway.cli.check import _SUITES
from tensorway.testing.servers import Server, launching

DOCS = Path(__file__).parents[2] / "docs" / "backends"
RESULTS, PAGE = DOCS / "conformance", DOCS / "compatibility.md"
BEGIN, END = "<!-- made by tests/conformance/results.py -->", "<!-- end -->"
#: Short ones, so that what waits for a lease or a deadline need not wait long.
SHORT = {"lease": 3.0, "deadline": 6.0, "presence": 3.0}
_CHILD = {"backend": "handover", "options": {"transport": "local", **SHORT}}
#: What backends are made with that need to be told something, or would have the suite wait for long.
OPTIONS = {
    "handover": {"transport": "local", **SHORT},
    "shared-store": {"folder": "{folder}", "deadline": 6.0, "presence": 3.0},
    "several": {
        "children": [{"name": "peer", **_CHILD}, {"name": "other", **_CHILD, "save": "never"}],
        "deadline": 9.0,
    },
    "fs": {"folder": "{folder}", "segment_bytes": 4 << 20},
    "object": {"url": "file://{folder}/bucket"},
}
#: Backends of ours that have no report, and why.
LEFT_OUT = {
    ("transport", "rixl"): "it needs a host with ROCm; its tests present NIXL under ROCm's names",
    ("eplb_communicator", "nccl"): "it needs a GPU; its tests let gloo stand in for NCCL",
    ("offload_tier", "peer"): "it has what other engines have, which the suite does not make; its tests do",
    ("rendezvous", "ray"): "it needs a cluster of Ray; its tests start one",
}
_TCPSTORE = """
import sys, time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
time.sleep(3600)
"""


class _Serves(Server):
    """A server of one rendezvous; `{port}` and `{folder}` in its command are its own."""

    def __init__(self, folder: Path, *command: str) -> None:
        super().__init__(folder)
        self.command = [word.format(port=self.port, folder=folder) for word in command]


#: For each rendezvous what serves it, and what its clients are told of that.
SERVERS: dict[str, tuple[list[str], dict[str, object]]] = {
    "direct": ([sys.executable, "-m", "tensorway", "rendezvous", "--port", "{port}"], {"address": "127.0.0.1:{port}"}),
    "etcd": (
        [
            "etcd",
            "--data-dir",
            "{folder}",
            "--listen-peer-urls",
            "http://127.0.0.1:0",
            "--listen-client-urls",
            "http://127.0.0.1:{port}",
            "--advertise-client-urls",
            "http://127.0.0.1:{port}",
        ],
        {"endpoints": ["http://127.0.0.1:{port}"]},
    ),
    "redis": (
        ["redis-server", "--port", "{port}", "--bind", "127.0.0.1", "--dir", "{folder}", "--save", ""],
        {"url": "redis://127.0.0.1:{port}/0"},
    ),
    "tcpstore": ([sys.executable, "-c", _TCPSTORE, "{port}"], {"address": "127.0.0.1:{port}"}),
}


@attrs.frozen
class Backend:
    """One of ours, of a kind that has a suite."""

    kind: str
    name: str

    @property
    def file(self) -> Path:
        """Its report."""
        return RESULTS / f"{self.kind}-{self.name}.json"


def ours() -> list[Backend]:
    """Every backend that the dists of this repository declare and that a suite exists for, by kind and name."""
    import importlib.metadata

    names = [f"tensorway{folder}" for folder in ("", *(f"-{path.name}" for path in _plugins()))]
    entries = [entry for name in names for entry in importlib.metadata.distribution(name).entry_points]
    found = [(entry.group.removeprefix("tensorway."), entry.name) for entry in entries]
    kinds = list(_SUITES)
    return [Backend(*pair) for pair in sorted(found, key=lambda pair: (pair[0], pair[1])) if pair[0] in kinds]


def _plugins() -> list[Path]:
    return sorted(path.parent for path in (DOCS.parents[1] / "plugins").glob("*/pyproject.toml"))


def check(backend: Backend) -> int:
    """Check one, and keep the report; the exit code of `tensorway check`."""
    command = [sys.executable, "-m", "tensorway", "check", backend.name, "--hook", backend.kind, "--deadline", "300"]
    with _options(backend) as options, tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "conformance.json")
        done = subprocess.run([*command, "--options", json.dumps(options), "--output", report], check=False)
        if report.exists():
            shutil.copyfile(report, backend.file)
    return done.returncode


@contextlib.contextmanager
def _options(backend: Backend) -> Iterator[dict[str, object]]:
    os.environ.setdefault("TENSORWAY_SECRET", secrets.token_hex(32))
    if backend.kind != "rendezvous":
        yield OPTIONS.get(backend.name, {})
        return
    command, options = SERVERS[backend.name]
    with tempfile.TemporaryDirectory() as folder, launching(partial(_Serves), Path(folder)) as launch:
        yield json.loads(json.dumps(options).replace("{port}", str(launch(*command).port)))


# -- the table


def table() -> str:
    """What the page says between its marks: made of the reports, and of nothing else."""
    lines = ["| kind | backend | dist | came of it | capabilities | checked with |", "|---|---|---|---|---|---|"]
    for backend in ours():
        if backend.file.exists():
            lines.append(_row(json.loads(backend.file.read_text("utf-8"))))
    lines += ["", "Not checked:", ""]
    left_out = {backend: LEFT_OUT.get((backend.kind, backend.name), "") for backend in ours()}
    lines += [f"- {backend.kind} `{backend.name}`: {why}." for backend, why in left_out.items() if why]
    return "\n".join(lines)


def _row(report: dict[str, object]) -> str:
    totals = report["totals"]
    counts = ", ".join(f"{totals[name]} {name}" for name in ("failed", "passed", "skipped") if totals[name])
    file = f"conformance/{report['kind']}-{report['name']}.json"
    capabilities = ", ".join(report["capabilities"]) or "-"
    kit = f"kit {report['tensorway']}, Python {report['python']}, {report['date'][:10]}"
    cells = [report["kind"], f"`{report['name']}`", f"{report['dist']} {report['version']}"]
    return f"| {' | '.join([*cells, f'[{counts}]({file})', capabilities, kit])} |"


def filled(page: str) -> str:
    """The page with the table of now."""
    before, rest = page.split(f"{BEGIN}\n")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


def main(words: list[str]) -> int:
    """`table`, or backends by name, or all of them; the exit code is 1 when a check has failed or did not run."""
    wanted = [] if words == ["table"] else [backend for backend in ours() if not words or backend.name in words]
    wrong = []
    for backend in wanted:
        left_out = (backend.kind, backend.name) in LEFT_OUT
        if not left_out and check(backend) != 0:
            wrong.append(f"{backend.kind} {backend.name}")
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
    print(f"{PAGE.name}: {len(list(RESULTS.glob('*.json')))} reports; failed: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
