from __future__ import annotations

import ast
import inspect
import json
import re
import stat
from importlib import metadata
from io import StringIO
from pathlib import Path

import attrs
import pytest

from tensorway import hookspecs
from tensorway.cli import new_plugin
from tensorway.cli.output import Output
from tensorway.errors import NewPluginRefused
from tensorway.plugins import scan
from tensorway.transport import Fabric
from tensorway.types import KINDS

GOOD_NAMES = ["acme", "a", "acme-kv", "acme_kv", "Acme", "acme2", "a--b", "a" * 64, "k2"]


def texts(name="acme", kind="transport"):
    return {file.path: file.text for file in new_plugin.plan(name, kind)}


def refusal(name="acme", kind="transport"):
    with pytest.raises(NewPluginRefused) as caught:
        new_plugin.plan(name, kind)
    return caught.value


def python_of(files):
    return {path: ast.parse(text, path) for path, text in files.items() if path.endswith(".py")}


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_good_name_is_one_that_the_host_takes_and_python_imports(name):
    assert scan._NAME.fullmatch(name)
    package = next(path.split("/")[1] for path in texts(name) if path.endswith("offers.py"))
    assert package.isidentifier()
    assert package.lower() == package


@pytest.mark.parametrize(
    ("name", "to_do"),
    [
        ("", "'acme'"),
        ("a b", "'a-b'"),
        ("Acme KV!", "'acme-kv'"),
        ("-acme", "'acme'"),
        ("acme-", "'acme'"),
        ("acme_", "'acme'"),
        ("a.b", "'a-b'"),
        ("1st", "'st'"),
        ("acmé", "'acm'"),
        ("acme\n", "'acme'"),
        ("../acme", "'acme'"),
        ("a" * 65, repr("a" * 64)),
        ("-auto", "'acme'"),
        ("\x1b[31m", "'m'"),
    ],
)
def test_a_name_of_the_wrong_shape_is_refused_with_one_that_would_do(name, to_do):
    error = refusal(name)
    assert f"A plugin {name[:80]!a} of kind 'transport' was to be made." == error.asked
    assert (
        error.true
        == "A name is a letter, then letters, digits, '-' or '_', the last one no dash; 64 characters at most."
    )
    assert to_do in error.to_do


@pytest.mark.parametrize("name", ["nixl", "NIXL", "rixl", "cpu", "gloo", "nccl", "local", "mooncake", "s3fifo", "vllm"])
def test_a_name_that_tensorway_uses_itself_is_refused(name):
    assert (
        f"A plugin '{name}' of kind 'transport' was to be made.\n"
        f"  Tensorway itself uses '{name.lower()}', and two dists that offer one name conflict.\n"
        "  Choose a name of your own, for example that of your product: 'acme'."
    ) == str(refusal(name))


@pytest.mark.parametrize("name", ["auto", "Auto", "AUTO"])
def test_the_name_auto_is_refused(name):
    assert (
        f"A plugin '{name}' of kind 'transport' was to be made.\n"
        "  'auto' is how users ask for the best backend that works here.\n"
        "  Choose a name of your own, for example that of your product: 'acme'."
    ) == str(refusal(name))


@pytest.mark.parametrize("name", ["class", "import", "None"])
def test_a_keyword_is_refused(name):
    assert (
        f"A plugin '{name}' of kind 'transport' was to be made.\n"
        f"  '{name}' is a keyword of Python.\n"
        "  Choose a name of your own, for example that of your product: 'acme'."
    ) == str(refusal(name))


@pytest.mark.parametrize(
    ("name", "to_do"),
    [
        ("tensorway-acme", "Try 'acme'."),
        ("tensorway_acme", "Try 'acme'."),
        ("tensorway-nixl", "Choose a name of your own, for example that of your product: 'acme'."),
        ("tensorway", "Choose a name of your own, for example that of your product: 'acme'."),
    ],
)
def test_the_name_of_a_dist_is_refused_with_the_part_that_is_the_name(name, to_do):
    assert (
        f"A plugin '{name}' of kind 'transport' was to be made.\n"
        "  The dist is called tensorway-NAME already; the name is the part after that.\n"
        f"  {to_do}"
    ) == str(refusal(name))


@pytest.mark.parametrize(
    ("kind", "to_do"),
    [
        ("transprot", "Did you mean 'transport'?"),
        ("kv-connector", "Did you mean 'kv_connector'?"),
        ("Platform", "Did you mean 'platform'?"),
        ("teleporter", "Use one of these."),
        ("", "Use one of these."),
        ("common", "Use one of these."),
    ],
)
def test_an_unknown_kind_is_refused_with_the_nearest(kind, to_do):
    assert (
        f"A plugin 'acme' of kind '{kind}' was to be made.\n"
        f"  There is no such kind. Kinds: {', '.join(KINDS)}.\n"
        f"  {to_do}"
    ) == str(refusal(kind=kind))


def test_every_extra_of_the_core_is_a_reserved_name():
    assert set() == set(metadata.metadata("tensorway").get_all("Provides-Extra")) - new_plugin.RESERVED


def test_planning_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_same_files_and_some_what_their_suites_need(kind):
    more = {
        "transport": {"src/tensorway_acme/wire.py", "tests/test_transport.py"},
        "kv_connector": {f"src/tensorway_acme/{name}.py" for name in ("mover", "shelf")} | {"tests/test_contract.py"},
    }
    assert more.get(kind, {"tests/test_contract.py"}) | {
        ".github/workflows/test.yml",
        ".gitignore",
        "README.md",
        "pyproject.toml",
        "src/tensorway_acme/__init__.py",
        "src/tensorway_acme/backend.py",
        "src/tensorway_acme/offers.py",
        "src/tensorway_acme/options.py",
        "src/tensorway_acme/probe.py",
        "src/tensorway_acme/py.typed",
        "tests/test_backend.py",
        "tests/test_offer.py",
    } == set(texts(kind=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["acme", "acme-kv", f"acme-{'x' * 20}"])
def test_the_texts_are_whole(name, kind):
    for path, text in texts(name, kind).items():
        # What is left with a dollar is an expression of the workflow, and it keeps both braces.
        assert re.findall(r"\$(?!\{\{ )", text) == [], path
        assert text == (f"{text.rstrip()}\n" if text else ""), path
        assert [line for line in text.splitlines() if line != line.rstrip() or "\t" in line] == [], path


@pytest.mark.parametrize("kind", KINDS)
def test_the_python_parses_and_explains_itself(kind):
    for path, tree in python_of(texts("acme-kv", kind)).items():
        assert ast.get_docstring(tree), path


@pytest.mark.parametrize("kind", KINDS)
def test_no_line_is_longer_than_what_the_project_says(kind):
    long = [line for text in texts(kind=kind).values() for line in text.splitlines() if len(line) > 120]
    assert long == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_hook_has_the_signature_of_the_contract(kind):
    tree = python_of(texts(kind=kind))["src/tensorway_acme/offers.py"]
    hook = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == kind)
    signature = f"({ast.unparse(hook.args)}) -> {ast.unparse(hook.returns)}"
    assert str(inspect.signature(hookspecs.HOOKS[kind])).replace("'", "") == signature


@pytest.mark.parametrize("kind", KINDS)
def test_the_metadata_says_what_the_host_looks_for(kind):
    text = texts("acme-kv", kind)["pyproject.toml"]
    assert f'[project.entry-points."tensorway.api"]\n{hookspecs.API} = "tensorway_acme_kv"\n' in text
    assert f'[project.entry-points."tensorway.{kind}"]\nacme-kv = "tensorway_acme_kv.offers:{kind}"\n' in text
    assert '\nname = "tensorway-acme-kv"\n' in text


def test_it_wants_the_python_that_the_core_wants():
    wanted = metadata.metadata("tensorway")["Requires-Python"]
    assert f'\nrequires-python = "{wanted}"\n' in texts()["pyproject.toml"]


@pytest.mark.parametrize(
    ("version", "requirement"),
    [
        ("0.1.0", "tensorway>=0.1.0,<0.2"),
        ("0.9.3", "tensorway>=0.9.3,<0.10"),
        ("0.2.0.dev4+g1a2b3c", "tensorway>=0.2.0.dev4,<0.3"),
        ("1.4.2", "tensorway>=1.4.2,<2"),
    ],
)
def test_it_wants_this_core_up_to_the_next_that_may_break_it(monkeypatch, version, requirement):
    monkeypatch.setattr("tensorway.__version__", version)
    assert f'"{requirement}"' in texts()["pyproject.toml"]


@pytest.mark.parametrize(
    ("name", "kind", "backend"),
    [
        ("acme", "offloading", "AcmeOffloadingWorker"),
        ("acme-kv", "kv_connector", "AcmeKVKVConnectorPlanner"),
        ("acme", "eplb_communicator", "AcmeEplbCommunicator"),
        ("big-acme_io", "observer", "BigAcmeIoObserver"),
        ("acme-rendezvous", "rendezvous", "AcmeRendezvous"),
    ],
)
def test_the_backend_is_named_for_name_and_kind(name, kind, backend):
    trees = python_of(texts(name, kind)).items()
    classes = {
        node.name
        for path, tree in trees
        if "/src/" in f"/{path}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert {backend, f"{re.sub('Worker$|Planner$', '', backend)}Options"} <= classes


def test_a_transport_is_a_fabric_of_two_pages_and_every_method_of_the_contract():
    tree = python_of(texts("big-acme", "transport"))["src/tensorway_big_acme/backend.py"]
    (fabric,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert "BigAcmeFabric" == fabric.name
    assert len(texts()["src/tensorway_acme/backend.py"].splitlines()) <= 150
    methods = {node.name: ast.unparse(node.args) for node in fabric.body if isinstance(node, ast.FunctionDef)}
    wanted = {name: method for name, method in vars(Fabric).items() if inspect.isfunction(method) and name[0] != "_"}
    assert set() == set(wanted) - set(methods)
    for name, method in wanted.items():
        arguments = [word.split(":")[0].strip() for word in re.sub(r"\[.*?\]", "", methods[name]).split(",")]
        assert list(inspect.signature(method).parameters) == arguments, name


def test_it_is_written_into_a_folder_of_its_own(tmp_path):
    result = new_plugin.run("acme", "transport", tmp_path)
    assert tmp_path / "tensorway-acme" == result.directory
    written = {str(path.relative_to(result.directory)) for path in result.directory.rglob("*") if path.is_file()}
    assert set(result.files) == written
    assert {path: (result.directory / path).read_text() for path in written} == texts()
    assert [result.directory] == list(tmp_path.iterdir())


def test_it_says_how_to_install_and_test_it(tmp_path):
    result = new_plugin.run("acme-kv", "kv_connector", tmp_path / "my plugins")
    assert (
        f"cd '{tmp_path}/my plugins/tensorway-acme-kv'",
        'python -m pip install --editable ".[test]"',
        "python -m pytest",
        "tensorway why kv_connector acme-kv",
    ) == result.next_steps


def test_a_path_that_is_given_relative_stays_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path("tensorway-acme") == new_plugin.run("acme", "transport", Path()).directory
    assert (tmp_path / "tensorway-acme" / "pyproject.toml").is_file()


def test_folders_on_the_way_are_made(tmp_path):
    (tmp_path / "a").mkdir()
    assert new_plugin.run("acme", "transport", tmp_path / "a" / ".." / "b" / "c").directory.is_dir()
    assert {"a", "b"} == {path.name for path in tmp_path.iterdir()}


def test_the_folder_can_be_read_by_whom_any_new_folder_can(tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    target = new_plugin.run("acme", "transport", tmp_path).directory
    assert stat.S_IMODE(plain.stat().st_mode) == stat.S_IMODE(target.stat().st_mode)


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "tensorway-acme").mkdir()
    assert (new_plugin.run("acme", "transport", tmp_path).directory / "pyproject.toml").is_file()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    target = tmp_path / "tensorway-acme"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(NewPluginRefused) as caught:
        new_plugin.run("acme", "transport", tmp_path)
    assert (
        f"A plugin was to be written to {target}.\n"
        "  That folder is there already, and it is not empty.\n"
        "  Choose another name, or another place for it: --dir PATH."
    ) == str(caught.value)
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert [target] == list(tmp_path.iterdir())


def test_a_file_of_that_name_is_left_alone(tmp_path):
    target = tmp_path / "tensorway-acme"
    target.write_text("mine")
    with pytest.raises(NewPluginRefused, match=r"A file is there\."):
        new_plugin.run("acme", "transport", tmp_path)
    assert target.read_text() == "mine"


def test_a_refused_name_leaves_no_folder_behind(tmp_path):
    with pytest.raises(NewPluginRefused):
        new_plugin.run("nixl", "transport", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", [".", "not/there/yet"])
def test_a_write_that_fails_halfway_leaves_nothing(tmp_path, monkeypatch, below):
    written = []
    write_text = Path.write_text

    def full_disk(self, *args, **kwargs):
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(write_text(self, *args, **kwargs))

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(NewPluginRefused) as caught:
        new_plugin.run("acme", "transport", tmp_path / below)
    assert len(written) == 5
    assert list(tmp_path.iterdir()) == []
    assert (
        f"A plugin was to be written to {tmp_path / below / 'tensorway-acme'}.\n"
        "  Writing failed, and nothing was left behind: No space left on device.\n"
        "  Choose a folder that you may write to: --dir PATH."
    ) == str(caught.value)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        new_plugin.run("acme", "transport", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NewPluginRefused, match=r"nothing was left behind: Not a directory\."):
        new_plugin.run("acme", "transport", tmp_path / "file")


def test_somebody_who_fills_the_folder_meanwhile_wins(tmp_path, monkeypatch):
    target = tmp_path / "tensorway-acme"
    rename = Path.rename

    def late(self, other):
        target.mkdir()
        (target / "mine").write_text("mine")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(NewPluginRefused, match="Directory not empty"):
        new_plugin.run("acme", "transport", tmp_path)
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert [target] == list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote_and_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream = StringIO()
    assert new_plugin.command(Output(stream=stream), "acme", "transport", Path()) == 0
    lines = stream.getvalue().splitlines()
    assert lines[0] == "tensorway-acme: 14 files"
    assert lines[15:17] == ["Next:", "  cd tensorway-acme"]
    assert lines[-1] == "  tensorway why transport acme"


def test_the_command_prints_one_object_on_request(tmp_path, capsys):
    assert new_plugin.command(Output(as_json=True), "acme", "transport", tmp_path) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {"schema", *(field.name for field in attrs.fields(new_plugin.Result))} == set(answer)
    assert answer["schema"] == "tensorway.new-plugin/1"
    assert str(tmp_path / "tensorway-acme") == answer["directory"]
    assert "pyproject.toml" in answer["files"]
