"""The demo as people run it, in processes of its own; and what dists of others bring, in folders that pip never saw.

The tests of the demo import this, and `conftest` makes it be found.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from importlib.resources import files
from pathlib import Path

import jsonschema

from tensorway.testing.stops import children

#: What a run here has: the transport that is always there, and no more than it needs.
QUICK = ("demo", "--quick", "--backend", "local")
SCHEMAS = json.loads((files("tensorway_tools.demo") / "schemas.json").read_text("utf-8"))


class Folder:
    """Where the command line runs, and modules and dists that only it finds."""

    def __init__(self, path):
        self.path = path
        self.processes = []

    def close(self):
        """End whatever a test that failed has left."""
        for process in self.processes:
            process.kill()
            process.communicate()

    def brings(self, movement, source, dist="acme-demo"):
        """A dist whose part of the demo is the function `show` of this source."""
        module = dist.replace("-", "_")
        info = self.path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[tensorway.api]\n1 = {module}\n[tensorway.demo]\n{movement} = {module}:show\n"
        )
        (self.path / f"{module}.py").write_text(textwrap.dedent(source))

    def environment(self, **variables):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("TENSORWAY_", "COLUMNS"))}
        return kept | {"PYTHONPATH": str(self.path)} | variables

    def start(self, *arguments, **variables):
        """The command line, running."""
        return self.started("-m", "tensorway", *arguments, **variables)

    def started(self, *arguments, **variables):
        """Python, running."""
        self.processes.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.path,
                env=self.environment(**variables),
                # What runs the tests in the background may have it ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return self.processes[-1]

    def run(self, *arguments, **variables):
        """The same when it has ended: a process that is done, and shows no traceback."""
        return self.python("-m", "tensorway", *arguments, **variables)

    def python(self, *arguments, **variables):
        """Python, when it has ended."""
        process = self.started(*arguments, **variables)
        out, err = process.communicate(timeout=100)
        assert "Traceback" not in out + err
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def answer(self, *arguments, **variables):
        """The JSON of a run, checked against its schema, and the exit code."""
        done = self.run(*arguments, "--json", **variables)
        data = json.loads(done.stdout)
        schema = {"$defs": SCHEMAS["$defs"], **SCHEMAS["$defs"][data["schema"]]}
        jsonschema.validate(data, schema, cls=jsonschema.Draft202012Validator)
        assert done.returncode == data["exit_code"]
        return data, done.returncode


def ranks_below(process):
    """Ranks that a run of the demo has started. What these start is none, though it has their words at first."""
    below, found = [process.pid], []
    while below:
        new = children(below.pop())
        ranks = [pid for pid in new if b"tensorway.testing.ranks" in command_of(pid)]
        found += ranks
        below += [pid for pid in new if pid not in ranks]
    return found


def command_of(pid):
    """The words of a process; nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
