"""A file of results: what was measured, of what, where and how; written once, and read as a stranger's.

Of the package `bench` everything may import this; it may import the core. All samples are kept, so that whoever reads
one needs nobody's summary. It names no host and no user, and nothing of a repository.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

import tensorway
from tensorway.cli import reports
from tensorway.errors import OptionsInvalid
from tensorway.plugins import scan
from tensorway.plugins.scan import printable
from tensorway_tools.benchmark import Clock
from tensorway_tools.machine import Machine

SCHEMA: Final = "tensorway.bench/1"
#: `cannot`: something is missing here; `failed`: it raised, hung or died, perhaps after some rows.
State = Literal["measured", "cannot", "failed"]
#: Libraries whose version a figure may depend on.
LIBRARIES: Final = ("nixl-cu12", "nixl-cu13", "mooncake-transfer-engine-non-cuda", "torch", "obstore", "numpy", "pyzmq")
_MOST_BYTES: Final = 256 << 20
#: No ratio of times comes near it, and the sum of two, of which a median may be made, is finite below it.
MOST_RATIO: Final = 1e300

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=300)]


class Sample(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One round: in which process, and seconds of ours and of the reference."""

    process: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    ours: _Seconds
    reference: Annotated[float, msgspec.Meta(gt=0, le=1e6)]

    @property
    def ratio(self) -> float:
        """How many times as long ours took."""
        return self.ours / self.reference


class RowResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row, of all processes that measured it."""

    name: _Name
    to: str
    clock: Clock
    nbytes: Annotated[int, msgspec.Meta(ge=0)]
    samples: Annotated[list[Sample], msgspec.Meta(min_length=1, max_length=1_000_000)]
    #: Of the ratios; `median` and so on are for readers, and made from the samples when a file is read by us.
    median: float = 0.0
    least: float = 0.0
    most: float = 0.0

    @property
    def ratios(self) -> list[float]:
        """All of them."""
        return [sample.ratio for sample in self.samples]

    @property
    def seconds(self) -> float:
        """The median of what ours took."""
        return statistics.median(sample.ours for sample in self.samples)


class BenchResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of one benchmark."""

    name: _Name
    dist: str
    version: str
    summary: str
    state: State
    why: str
    seconds: float
    rows: list[RowResult]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How it was run."""

    short: bool
    processes: int


class Results(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file."""

    schema: Literal["tensorway.bench/1"]
    machine: Machine
    versions: dict[str, str]
    options: Options
    #: The load of the machine before and after: who else was there.
    load: tuple[float, float]
    benchmarks: list[BenchResult]


_DECODER: Final = msgspec.json.Decoder(Results)


def row_result(name: str, to: str, clock: Clock, nbytes: int, samples: Sequence[Sample]) -> RowResult:
    """With its figures for readers."""
    ratios = sorted(sample.ratio for sample in samples)
    return RowResult(name, to, clock, nbytes, list(samples), statistics.median(ratios), ratios[0], ratios[-1])


def versions(dists: Iterable[str]) -> dict[str, str]:
    """What is installed of these dists and of libraries that figures depend on."""
    found = {"python": platform.python_version(), "tensorway": tensorway.__version__}
    for dist in (*sorted(set(dists)), *LIBRARIES):
        if version := scan.installed_version(dist):
            found[dist] = version
    return found


def read(path: Path) -> Results:
    """A file of results, checked."""
    asked = f"Results were to be read from {path}."
    to_do = "Give a file that tensorway bench run has written: --output FILE."
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise OptionsInvalid(asked, f"It has more than {_MOST_BYTES >> 20} MiB.", to_do)
        found = _DECODER.decode(path.read_bytes())
    except OSError as error:
        raise OptionsInvalid(asked, f"The system does not read it: {error.strerror}.", to_do) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise OptionsInvalid(asked, f"It is no file of results: {printable(str(error))}", to_do) from error
    names = [(bench.name, row.name) for bench in found.benchmarks for row in bench.rows]
    if len(set(names)) != len(names):
        raise OptionsInvalid(asked, "A row is there twice.", to_do)
    if not all(sample.ratio < MOST_RATIO for bench in found.benchmarks for row in bench.rows for sample in row.samples):
        raise OptionsInvalid(asked, "A sample is no number.", to_do)
    return found


def write(path: Path, results: Results) -> None:
    """To a file, whole or not at all."""
    reports.write(path, msgspec.json.format(msgspec.json.encode(results), indent=1), "--output")
