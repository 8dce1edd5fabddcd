"""A backend in a fresh interpreter, the way the host meets it: for tests of what an operator sees of a library.

Room `testing`. A library that is missing, broken or aborting can only be had in a process of its own; these start
one, with folders of the test's making in front of its path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tensorway import settings

#: Loads and probes one backend, twice, and prints what became of it.
_PROBE: Final = """
import json, logging, sys
from tensorway.plugins import Host
from tensorway.plugins.scan import scan
from tensorway.settings import Settings

lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append([record.levelname, record.getMessage()])
logging.getLogger().addHandler(Keep())
kind, name, *native = sys.argv[1:]
host = Host(scan(), Settings(probe_timeout=60.0))
(slot,) = [slot for slot in host.slots(kind) if slot.declaration.name == name]
slot.load(host.context, 60.0)
for _ in range(2):
    slot.probe(60.0)
record, result = slot.record, slot.probe_result
print(json.dumps({
    "code": record and record.code,
    "reason": record.reason if record else result.reason,
    "remedy": record and record.remedy,
    "facts": dict(result.facts) if result else {},
    "state": slot.state.value,
    "lines": lines,
    "native": sorted(name for name in sys.modules if name.partition(".")[0] in native),
}))
"""

#: A `sitecustomize` that makes packages look as if nobody had installed them, in this interpreter and its children.
_HIDING: Final = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


def fresh_python(
    code: str, *arguments: str, path: Sequence[Path] = (), without: tuple[str, ...] = (), **environment: str | None
) -> Any:
    """Run code in a new interpreter; what its last line says, as JSON.

    `path` is in front of what it finds, `environment` is added to ours, less the variables that begin with `without`.
    """
    variables = {name: value for name, value in settings.environment().items() if not name.startswith(without)}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, path))
    variables |= {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def probe_elsewhere(
    kind: str,
    name: str,
    *path: Path,
    native: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    **environment: str | None,
) -> dict[str, Any]:
    """What the host makes of a backend in a new interpreter: code, reason, remedy, facts, state, lines that it logged.

    Fails if one of the `native` packages (torch and numpy are always among them) came into the process that asked.
    """
    packages = ("torch", "numpy", *native)
    answer: dict[str, Any] = fresh_python(_PROBE, kind, name, *packages, path=path, without=without, **environment)
    assert [] == answer["native"], "the probe loaded something into the process that asked"
    return answer


def hide(folder: Path, *names: str) -> Path:
    """Make `folder` one that hides packages from the interpreters that have it on their path."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_HIDING.format(hidden=set(names)), "utf-8")
    return folder
