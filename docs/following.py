"""Does what a page says, to the letter: its console blocks in one shell, its files written where they are named.

Needs nothing but Python. `docs/conftest.py` runs each block of each page with it; as a script it follows one page from
a folder that is empty: `python docs/following.py docs/authoring.md --until "What the suite checks"`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

#: What a reader has after cloning, as far as the pages use it.
CHECKOUT = ("core", "plugins", "constraints.txt", "pyproject.toml", "LICENSE")

#: The page that needs a vLLM, which the others are tested without: `nox -s tasks` follows it where there is one.
WITH_VLLM = "vllm-begin.md"

# The shell's own words around each command: where it starts, and what it leaves behind for the next.
WRAPPER = """\
(exit {status})
{command}
__status=$?
pwd > "{state}/folder"
env -0 > "{state}/environment"
exit $__status
"""


class Shell:
    """What a reader's terminal remembers between two commands."""

    def __init__(self, folder, checkout=None, seconds=600):
        """It starts in an empty folder, or in a copy of a checkout; `seconds` is how long one command may take."""
        self.state = folder / "state"
        self.state.mkdir()
        self.seconds = seconds
        self.folder = folder / "tensorway"
        self.folder.mkdir()
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
        for name in CHECKOUT if checkout else ():
            whole = (checkout / name).is_dir()
            copy = partial(shutil.copytree, ignore=left_out) if whole else shutil.copy2
            copy(checkout / name, self.folder / name)
        foreign = ("TENSORWAY_", "PYTHON", "PYTEST_", "VIRTUAL_ENV", "COLUMNS", "COV_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environment |= {"TERM": "dumb", "LC_ALL": "C.UTF-8", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        self.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.status = 0

    def run(self, command):
        """Run one command as bash would at a prompt; returns what it printed, both streams together."""
        script = WRAPPER.format(status=self.status, command=command, state=self.state)
        with subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=self.seconds)
            except BaseException as error:  # Ctrl-C, too: nobody else ends what is in a session of its own
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                output, _ = process.communicate()
                self.status = 124  # as of `timeout`: a page that shows any output at all would be right otherwise
                return f"{output}\n(killed: no end after {self.seconds} s)"
        self.status = process.returncode
        self.folder = Path((self.state / "folder").read_text().rstrip("\n"))
        pairs = (self.state / "environment").read_text().split("\0")
        self.environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        return output

    def told(self, command, output):
        """What a command has printed as the page says, for who looks closer."""
        print(f"$ {command}\n{output}", end="", flush=True)


def commands(source):
    """The commands of a console block, each with what the page says that it prints.

    `$ ` starts a command, `> ` continues it, everything else is output.
    """
    found = []
    for line in source.splitlines():
        if line.startswith("$ "):
            found.append([line[2:], []])
        elif line.startswith("> ") and found and not found[-1][1]:
            found[-1][0] += f"\n{line[2:]}"
        elif found:
            found[-1][1].append(line)
        else:
            raise ValueError(f"a console block starts with a command, not with {line!r}")
    return [(command, "\n".join(lines)) for command, lines in found]


def matches(expected, actual):
    """Whether output is as shown: `...` within a line stands for anything there, on a line of its own for any lines."""
    pattern = ""
    for line in expected.splitlines():
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*".join(map(re.escape, line.rstrip().split("..."))) + r"[ \t]*\n"
    return re.fullmatch(pattern, actual if actual.endswith("\n") or not actual else f"{actual}\n") is not None


def problem(command, expected, actual):
    """The text of a failure: what is shown, what was printed, and where they differ."""
    lines = difflib.unified_diff(expected.splitlines(), actual.splitlines(), "on the page", "printed", lineterm="")
    return "\n".join(["Printed:", actual, "", f"$ {command}", *lines])


#: A fence with its language and options (`:caption:`), or a heading.
FENCE = re.compile(
    r"^```(?:\{code-block\} )?(\w+)\n((?::\w+:[^\n]*\n)*)(.*?)^```$|^## ([^\n]+)$", re.MULTILINE | re.DOTALL
)


def follow(page, shell, until="", instead=()):
    """Do what the page says up to the heading `until`; the text of the first thing that comes out otherwise, or None.

    `instead` are pairs: what the page writes in a command, and what stands for it here.
    """
    for language, options, source, heading in FENCE.findall(page.read_text("utf-8")):
        if heading and heading == until:
            return None
        caption = re.search(r":caption: (\S+)", options)
        if caption:
            (shell.folder / caption[1]).write_text(source.lstrip("\n"), "utf-8")
        elif language == "console":
            found = run_block(shell, source, instead)
            if found is not None:
                return found
    return f"the page has no heading {until!r}" if until else None


def run_block(shell, source, instead=()):
    """Run the commands of a block; a status other than 0 must be shown by `echo $?` right after."""
    shown = commands(source)
    for number, (written, expected) in enumerate(shown):
        command = written
        for old, new in instead:
            command = command.replace(old, new)
        actual = shell.run(command)
        if not matches(expected, actual):
            return problem(command, expected, actual)
        following = shown[number + 1][0] if number + 1 < len(shown) else ""
        if shell.status != 0 and following != "echo $?":
            return f"$ {command}\nended with {shell.status}, and the page does not say so\n{actual}"
        shell.told(written, actual)
    return None


def main():
    """Follow a page in a folder that is empty; the exit code is 1 when something came out otherwise."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="where to work: empty")
    parser.add_argument("--checkout", type=Path, help="begin in a copy of this, and not in a folder that is empty")
    parser.add_argument("--until", default="", metavar="HEADING", help="stop before this heading")
    parser.add_argument("--instead", action="append", default=[], metavar="OLD=NEW", help="what stands for what")
    given = parser.parse_args()
    shell = Shell(given.folder, given.checkout)
    found = follow(given.page, shell, given.until, [pair.split("=", 1) for pair in given.instead])
    print(found or f"{given.page}: everything came out as it says; it ended in {shell.folder}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
