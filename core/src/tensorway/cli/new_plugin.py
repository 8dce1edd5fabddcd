"""`tensorway new-plugin`: a dist that installs, is discovered and passes its own tests at once.

Room `cli`. `plan` is pure: a name and a kind in, files out. `write` puts them where nothing was, all or none. The
texts are the files of `template/`: `common` for every kind, and what a folder named like the kind has instead or beside
it. They end in `.tmpl`, so that no tool takes them for code; `__package__` in a path becomes the package, `dot_` a dot.
A kind that differs in some words only says them in its `words.json`.
"""

from __future__ import annotations

import difflib
import json
import keyword
import re
import shlex
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Final

import attrs

import tensorway
from tensorway.cli import exits
from tensorway.cli.output import Output
from tensorway.errors import NewPluginRefused
from tensorway.hookspecs import API, HOOKS
from tensorway.plugins.scan import canonical

if TYPE_CHECKING:
    from importlib.abc import Traversable

#: Stricter than the host: the name also becomes a package and a dist, whose names know neither dots nor a dash at the
#: end.
_NAME: Final = re.compile(r"[A-Za-z]([A-Za-z0-9_-]{0,62}[A-Za-z0-9])?", re.ASCII)

#: What tensorway's own dists and built-in backends are called, now or by plan. A test holds that every extra is here.
RESERVED: Final = frozenset(
    {"arc", "cpu", "cuda", "direct", "eplb", "etcd", "fs", "gloo", "handover", "kv", "local", "lru", "mooncake", "nccl"}
    | {"nixl", "object", "ray", "redis", "rixl", "rocm", "s3fifo", "sieve", "tcpstore", "testing", "tools"}
    | {"several", "shared-store", "offload", "peer", "tinylfu", "foresight", "vllm", "xpu"}
)


@attrs.frozen
class GeneratedFile:
    """One file of the new dist."""

    #: Below the dist's folder, with `/` between the parts.
    path: str
    text: str


@attrs.frozen
class Result:
    """What was written, and what to do with it."""

    directory: Path
    #: Paths below `directory`.
    files: tuple[str, ...]
    #: Shell commands that install the dist and run its tests.
    next_steps: tuple[str, ...]


def command(out: Output, name: str, kind: str, directory: Path) -> int:
    """Write the dist and say what comes next; returns the exit code."""
    result = run(name, kind, directory)
    out.json("tensorway.new-plugin/1", {**attrs.asdict(result), "directory": str(result.directory)})
    out.line(f"{result.directory}: {len(result.files)} files")
    for path in result.files:
        out.line(f"  {path}")
    out.line("Next:")
    for step in result.next_steps:
        out.line(f"  {step}")
    return exits.OK


def run(name: str, kind: str, directory: Path) -> Result:
    """Write the dist into a new folder `tensorway-<name>` of `directory`; raises `NewPluginRefused`."""
    files = plan(name, kind)
    target = directory / dist_name(name)
    write(files, target)
    return Result(
        directory=target,
        files=tuple(file.path for file in files),
        next_steps=(
            f"cd {shlex.quote(str(target))}",
            'python -m pip install --editable ".[test]"',
            "python -m pytest",
            f"tensorway why {kind} {name}",
        ),
    )


def dist_name(name: str) -> str:
    """What the dist of a backend is called, in the index's own spelling."""
    return f"tensorway-{canonical(name)}"


def plan(name: str, kind: str) -> tuple[GeneratedFile, ...]:
    """The files of a new dist, by path; touches nothing."""
    _check(name, kind)
    root = resources.files("tensorway.cli") / "template"
    words = _words(name, kind, root)
    # What the kind has of its own comes second, and replaces what every kind has.
    texts = {path: source for folder in ("common", kind) for path, source in _templates(root / folder)}
    files = (GeneratedFile(_path(path, words), _filled(source, words)) for path, source in texts.items())
    return tuple(sorted(files, key=lambda file: file.path))


def write(files: tuple[GeneratedFile, ...], target: Path) -> None:
    """Make the folder `target` with these files in it: all of them, or no trace."""
    asked = f"A plugin was to be written to {target}."
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            what = "That folder is there already, and it is not empty." if target.is_dir() else "A file is there."
            raise NewPluginRefused(asked, what, "Choose another name, or another place for it: --dir PATH.")
        _make(files, target.resolve())
    except OSError as error:
        true = f"Writing failed, and nothing was left behind: {error.strerror or error}."
        raise NewPluginRefused(asked, true, "Choose a folder that you may write to: --dir PATH.") from error


def _make(files: tuple[GeneratedFile, ...], target: Path) -> None:
    # Everything that is missing of the path comes into being by one rename, which works over an empty folder too.
    top = next((path for path in (*reversed(target.parents), target) if not path.exists()), target)
    with tempfile.TemporaryDirectory(prefix=".tensorway-", dir=top.parent) as scratch:
        # One level down, because a temporary folder itself can be read by its owner only.
        made = Path(scratch) / top.name
        for file in files:
            path = made / target.relative_to(top) / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file.text, "utf-8")
        made.rename(top)


def _check(name: str, kind: str) -> None:
    asked = f"A plugin {name[:80]!a} of kind {kind[:80]!a} was to be made."
    if kind not in HOOKS:
        near = difflib.get_close_matches(kind.lower().replace("-", "_"), HOOKS, n=1)
        to_do = f"Did you mean {near[0]!r}?" if near else "Use one of these."
        raise NewPluginRefused(asked, f"There is no such kind. Kinds: {', '.join(HOOKS)}.", to_do)
    problem = _name_problem(name)
    if problem is not None:
        raise NewPluginRefused(asked, *problem)


def _name_problem(name: str) -> tuple[str, str] | None:
    """What is true of a name that cannot be taken, and what to do about it."""
    normal = canonical(name)
    if not _NAME.fullmatch(name):
        true = "A name is a letter, then letters, digits, '-' or '_', the last one no dash; 64 characters at most."
        return true, _suggest(re.sub(r"[^a-z0-9]+", "-", name[:64].lower()).strip("-0123456789"))
    if normal == "auto":
        return "'auto' is how users ask for the best backend that works here.", _suggest()
    if normal in RESERVED:
        return f"Tensorway itself uses {normal!r}, and two dists that offer one name conflict.", _suggest()
    if keyword.iskeyword(name):
        return f"{name!r} is a keyword of Python.", _suggest()
    if normal.startswith("tensorway"):
        true = "The dist is called tensorway-NAME already; the name is the part after that."
        return true, _suggest(normal.removeprefix("tensorway").strip("-"))
    return None


def _suggest(better: str = "") -> str:
    if better and _name_problem(better) is None:
        return f"Try {better!r}."
    return "Choose a name of your own, for example that of your product: 'acme'."


def _words(name: str, kind: str, root: Traversable) -> dict[str, str]:
    """What the templates may say: the same for all, and what `words.json` of a kind's folder says in these words."""
    backend = _camel(name)
    backend += "" if backend.endswith(_camel(kind)) else _camel(kind)
    words = {
        "name": name,
        "kind": kind,
        "dist": dist_name(name),
        "package": dist_name(name).replace("-", "_"),
        "backend_class": backend,
        "fabric_class": f"{_camel(name)}Fabric",
        "options_class": f"{backend}Options",
        # The first line of the hook's own documentation: one place says what a kind is for.
        "kind_summary": str(HOOKS[kind].__doc__).splitlines()[0],
        "api": str(API),
        "core_series": _series(),
        "core_range": _core_range(),
    }
    for folder in ("common", kind):
        own = root / folder / "words.json"
        said = json.loads(own.read_text("utf-8")) if own.is_file() else {}
        words |= {word: Template(text).substitute(words) for word, text in said.items()}
    return words


def _camel(text: str) -> str:
    parts = (part for part in re.split(r"[-_]", text) if part)
    return "".join("KV" if part == "kv" else part[0].upper() + part[1:] for part in parts)


def _series() -> str:
    return ".".join(tensorway.__version__.split(".")[:2])


def _core_range() -> str:
    """From this core up to the next one that may break what was written for it; all dists of ours have its version."""
    # A local version (`+g1a2b3c`) is not allowed in a range.
    version = tensorway.__version__.partition("+")[0]
    major, minor = (int(part) for part in _series().split("."))
    return f">={version},<{f'0.{minor + 1}' if major == 0 else major + 1}"


def _templates(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    """Every template below a folder, with its path there; nothing when there is no such folder."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir():
            yield from _templates(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".tmpl"):
            yield f"{prefix}{entry.name}", entry


def _filled(source: Traversable, words: dict[str, str]) -> str:
    return Template(source.read_text("utf-8")).substitute(words)


def _path(template: str, words: dict[str, str]) -> str:
    path = template.removesuffix(".tmpl").replace("__package__", words["package"])
    return "/".join(re.sub("^dot_", ".", part) for part in path.split("/"))
