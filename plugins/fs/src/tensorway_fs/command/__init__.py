"""`tensorway offload ls|stat|verify|gc DIRECTORY`: what operators do with a folder of segments, engines running or not.

Of the dist nothing else imports this package; it may import all of the dist. It prints through what the command line
hands over, and says what cannot be done with the core's errors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs

from tensorway.errors import OptionsInvalid
from tensorway_fs.command.removing import Which, remove
from tensorway_fs.command.survey import Survey, surveys
from tensorway_fs.command.verifying import verify_all
from tensorway_fs.disk import Disk
from tensorway_fs.namespace import Root

_OK, _BROKEN = 0, 1


class Printer(Protocol):
    """The core's `Output`, which a plugin does not import."""

    def line(self, text: str = "") -> None:
        """One line."""

    def json(self, schema: str, fields: dict[str, Any]) -> None:
        """The whole answer, where that is asked for."""

    def progress(self, text: str) -> None:
        """What is being done."""


def ls(arguments: list[str], out: Printer) -> int:
    """The segments of a folder, the oldest first."""
    given = _parsed(_parser("ls", "List the segments of a folder, the oldest first."), arguments)
    rows = [survey.row() for survey in surveys(_root(given))]
    out.json("tensorway.offload-ls/1", {"directory": str(given.directory), "segments": rows})
    for row in rows:
        out.line(
            f"{row['space'][:12]}  {row['number']:>6}  {row['state']:<8} "
            f"{row['blocks']:>8} of {row['places']:>8} blocks  {_size(row['bytes']):>9}  {_age(row['age_seconds'])}"
        )
    out.line(f"{len(rows)} segments, {_size(sum(row['bytes'] for row in rows))}")
    return _OK


def stat(arguments: list[str], out: Printer) -> int:
    """What a folder holds, by fingerprint and tenant."""
    given = _parsed(_parser("stat", "Say what a folder holds, by fingerprint and tenant."), arguments)
    spaces = [_totals(name, found) for name, found in _by_space(_root(given)).items()]
    out.json("tensorway.offload-stat/1", {"directory": str(given.directory), "spaces": spaces})
    for space in spaces:
        out.line(
            f"{space['space']}: {space['blocks']:,} blocks, {_size(space['bytes'])} in {space['segments']} segments"
        )
        for name, value in space["facts"].items():
            out.line(f"  {name}: {value}".replace("\n", " "))  # whoever may write to the folder has written it
        for tenant, count in space["tenants"].items():
            out.line(f"  tenant {tenant}: {count:,} blocks")
        if space["damaged"]:
            out.line(f"  {space['damaged']} files cannot be read as segments")
    out.line(f"{len(spaces)} fingerprints, {_size(sum(space['bytes'] for space in spaces))}")
    return _OK


def verify(arguments: list[str], out: Printer) -> int:
    """Read every block of a folder; exit code 1 if one is not what was stored."""
    parser = _parser("verify", "Read every block of a folder, and compare it with its checksum.")
    parser.add_argument("--repair", action="store_true", help="remove what is damaged: it is computed anew")
    given = _parsed(parser, arguments)
    found = verify_all(_root(given), out.progress, repair=given.repair)
    out.json("tensorway.offload-verify/1", {"directory": str(given.directory), **attrs.asdict(found)})
    out.line(f"{found.sound:,} blocks are sound, {_size(found.nbytes)} read")
    for line in found.problems:
        out.line(line)
    if found.damaged or found.files:
        what = "removed" if given.repair else "left where they are"
        out.line(f"{found.damaged:,} blocks and {found.files} files are damaged, and {what}")
    return _BROKEN if found.damaged or found.files else _OK


def gc(arguments: list[str], out: Printer) -> int:
    """Remove what is selected; segments that are being written stay."""
    parser = _parser("gc", "Remove blocks; segments that an engine writes to now stay, but for those of a tenant.")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="the oldest segments, until so much is left")
    parser.add_argument("--older", type=float, metavar="SECONDS", help="segments whose last block is older")
    parser.add_argument(
        "--space", metavar="HEX", help="only of the fingerprint whose folder begins so; alone, all of it"
    )
    parser.add_argument("--tenant", metavar="HEX", help="blocks of a tenant, as `stat` names it")
    parser.add_argument("--salt", metavar="TEXT", help="the same by the salt of its requests")
    parser.add_argument("--damaged", action="store_true", help="files that cannot be read as segments")
    parser.add_argument("--dry-run", action="store_true", help="remove nothing")
    given = _parsed(parser, arguments)
    which = Which.of(given)
    done = remove(_root(given), which, dry=given.dry_run)
    fields = {"directory": str(given.directory), "dry_run": given.dry_run, **attrs.asdict(done)}
    out.json("tensorway.offload-gc/1", fields)
    would = "would be" if given.dry_run else "were"
    out.line(f"{done.segments} segments and {done.blocks:,} blocks {would} removed, {_size(done.nbytes)}")
    if done.kept:
        out.line(f"{done.kept} segments stay: an engine writes to them")
    return _OK


def _parser(action: str, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"tensorway offload {action}", description=about)
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="what the option `folder` of the tier names")
    return parser


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    return parser.parse_args(list(arguments))


def _root(given: argparse.Namespace) -> Root:
    root = Root(given.directory, Disk())
    if not root.top.is_dir():
        raise OptionsInvalid(
            f"The folder {given.directory} was to be looked at.",
            "It is none that a tier `fs` keeps blocks in: there is no folder v1 in it.",
            "Give what the tier's option `folder` names.",
        )
    return root


def _by_space(root: Root) -> dict[str, list[Survey]]:
    spaces: dict[str, list[Survey]] = {path.name: [] for path in root.spaces()}
    for survey in surveys(root):
        spaces.setdefault(survey.named.space, []).append(survey)
    return spaces


def _totals(space: str, found: Sequence[Survey]) -> dict[str, Any]:
    tenants: dict[str, int] = {}
    for survey in found:
        for tenant, count in survey.tenants().items():
            tenants[tenant] = tenants.get(tenant, 0) + count
    return {
        "space": space,
        "facts": found[0].facts() if found else {},
        "segments": len(found),
        "blocks": sum(survey.blocks for survey in found),
        "bytes": sum(survey.nbytes for survey in found),
        "damaged": sum(bool(survey.problem) for survey in found),
        "tenants": dict(sorted(tenants.items())),
    }


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "nothing stored"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
