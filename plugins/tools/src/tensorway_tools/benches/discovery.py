"""What importing, discovering and asking the host cost, beside what they stand on.

Of the dist only an entry point refers to this module; it may import the core and `benchmark`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tensorway import plugins
from tensorway.plugins import scan
from tensorway.plugins.host import Host
from tensorway.settings import Settings
from tensorway.types import Offer, ProbeResult
from tensorway_tools.benchmark import Benchmark, Row, Run

_CASES: Final = {
    "import tensorway": "import tensorway",
    "importing the host, and one scan": "import tensorway.plugins; tensorway.plugins.host()",
    "tensorway plugins list": (
        "import sys; sys.stdout = open('/dev/null', 'w')\nfrom tensorway.cli import main; main(['plugins', 'list'])"
    ),
}
_BASE: Final = "import pluggy"
_OFTEN: Final = 1000


def rows(run: Run) -> Iterator[Row]:
    """Fresh interpreters, folders of made-up dists, and a host."""
    for name, code in _CASES.items():
        pairs = [(_fresh(code), _fresh(_BASE)) for _ in range(run.either(15, 3))]
        ours, reference = zip(*pairs, strict=True)
        yield Row(name, f"{_BASE}, in a fresh interpreter", ours, reference, "cpu")
    for count in (50, 200, 1000):
        with tempfile.TemporaryDirectory() as folder:
            _write_dists(Path(folder), count)
            yield _scan(run, folder, count)
    yield _questions(run)


def _fresh(code: str) -> float:
    """CPU seconds of a fresh interpreter."""
    timed = (
        f"import time; started = time.process_time()\n{code}\n"
        "import sys; print(time.process_time() - started, file=sys.__stdout__)"
    )
    done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True, timeout=60)
    return float(done.stdout)


def _write_dists(folder: Path, count: int) -> None:
    """`count` dists, of which five offer a backend."""
    for number in range(count):
        info = folder / f"dist_{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{number}\nVersion: 1.0\n")
        ours = f"[tensorway.api]\n1 = m\n[tensorway.transport]\nname{number} = m:f\n"
        theirs = f"[console_scripts]\nname{number} = m:f\n"
        (info / "entry_points.txt").write_text(ours if number < 5 else theirs)


def _scan(run: Run, folder: str, count: int) -> Row:
    metadata = scan._metadata()

    def walk() -> list[Any]:
        return list(metadata.distributions(path=[folder]))

    return run.measured(
        f"scanning {count} dists", lambda: scan.scan(walk), lambda: [dist.entry_points for dist in walk()],
        to="parsing the entry points of all", rounds=run.either(30, 5), clock="cpu",
    )  # fmt: skip


def _questions(run: Run) -> Row:
    """Asked again, the host reads nothing anew."""
    offer = Offer(
        name="x", kind="transport", summary="A benchmark.", probe=lambda: ProbeResult.passed("yes"), probe_in="host",
        factory=lambda options, context: object(),
    )  # fmt: skip
    with plugins.isolated([offer]) as host:
        host.create("transport")
        return run.measured(
            f"constructing by name, {_OFTEN:,} times",
            lambda: [host.create("transport", "x") for _ in range(_OFTEN)],
            lambda: Host(scan.scan(), Settings()),
            to="the first question of a process", rounds=run.either(30, 5), clock="cpu",
        )  # fmt: skip


BENCH: Final = Benchmark("Importing, discovering and constructing, beside importing pluggy and parsing metadata.", rows)
