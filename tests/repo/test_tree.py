"""What must hold for the tree as a whole: README, gate, changelog, and nothing of the machine it was written on."""

from __future__ import annotations

import re
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GATE = ROOT / ".ci" / "run"
README_WORDS = 450

DISTS = {"tensorway"} | {f"tensorway-{path.parent.name}" for path in ROOT.glob("plugins/*/pyproject.toml")}
KINDS = {"added", "changed", "fixed", "removed"}
#: Files of changelog.d that are no fragments.
CHANGELOG_EXTRAS = {"README.md", "_template.md"}

# In pieces, so that this file does not find itself.
HOSTS = ["pypi" + ".org", "python" + "hosted.org", "registry.npm" + "js.org", "deb.deb" + "ian.org"]
PLACES = ["/" + place for place in ("work/", "root/", "tmp/", "opt/wheels", "opt/pypi")]
MACHINE = re.compile("|".join([*map(re.escape, HOSTS), *(rf"(?<![\w.$}}~-]){re.escape(place)}" for place in PLACES)]))


def committed():
    """Files that git has or would take."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted({ROOT / name for name in output.split("\0") if name and (ROOT / name).is_file()})


def setups():
    """The README's `sh` blocks that make an environment."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block.strip() for block in blocks if "python3 -m venv" in block]


def test_the_readme_sets_up_with_two_commands_of_one_line():
    assert [1, 1] == [len(block.splitlines()) for block in setups()]


def test_the_readme_installs_every_dist_to_show_the_demo():
    demo, _ = setups()
    folders = sorted(f"./{path.parent.relative_to(ROOT)}" for path in ROOT.glob("plugins/*/pyproject.toml"))
    install = " ".join([".venv/bin/pip install -c constraints.txt ./core", *folders])
    assert f"python3 -m venv .venv && {install} && .venv/bin/tensorway demo" == demo


def test_the_gate_runs_the_test_command_of_the_readme():
    _, test = setups()
    assert "python3 -m venv .venv && .venv/bin/pip install nox && .venv/bin/nox" == test
    lines = [line.strip().removesuffix(" || status=$?") for line in GATE.read_text(encoding="utf-8").splitlines()]
    assert test in lines
    assert GATE.stat().st_mode & stat.S_IXUSR


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= README_WORDS


def test_no_file_names_a_registry_or_a_path_of_the_machine():
    found = []
    for path in committed():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number}: {match[0]}" for match in MACHINE.finditer(line)]
    assert [] == found


@pytest.mark.parametrize(
    "line", ["index-url = https://" + HOSTS[0], "cd '" + PLACES[0] + "x'", "dir=" + PLACES[2] + "x", PLACES[3]]
)
def test_the_search_for_the_machine_finds_it(line):
    assert MACHINE.search(line)


@pytest.mark.parametrize("line", ["/opt/rocm/lib", "$HOME/tmp/x", "tests/work/x", "~/tmp/", "https://example.org/tmp/"])
def test_the_search_for_the_machine_leaves_others_alone(line):
    assert not MACHINE.search(line)


def test_changelog_fragments_say_issue_and_dist_and_kind_in_one_sentence():
    for path in (ROOT / "changelog.d").iterdir():
        if path.name in CHANGELOG_EXTRAS:
            continue
        name = re.fullmatch(r"(\d+)\.([\w-]+)\.(\w+)(?:\.\d+)?\.md", path.name)
        assert name, f"{path.name}: not <issue>.<dist>.<type>.md"
        assert name[2] in DISTS and name[3] in KINDS, path.name
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"`{name[2]}` "), f"{path.name}: starts with the dist's name in backticks"
        assert text.strip().endswith(".") and len(text.strip().splitlines()) == 1, f"{path.name}: one sentence"
