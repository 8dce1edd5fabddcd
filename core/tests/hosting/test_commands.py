"""Commands that plugins bring: found in metadata, imported when they are run, and as broken as they may be."""

from __future__ import annotations

import json
import re

import pytest

from tensorway.cli import commands, exits
from tensorway.plugins import scan
from tensorway.plugins.host import Host
from tensorway.settings import Settings

#: A command that says what it was given.
ECHO = """
from tensorway.errors import BackendUnavailable
def command(arguments, out):
    if arguments[:1] == ["refuse"]:
        raise BackendUnavailable("It was asked.", "It cannot.", "Ask another.")
    if arguments[:1] == ["help"]:
        import argparse
        argparse.ArgumentParser(prog="tensorway echo").parse_args(["--help"])
    out.progress("Echoing ...")
    out.json("acme.echo/1", {"arguments": arguments})
    out.line(f"given: {arguments}, debug: {out.debug}")
    return 7
"""


def install(site, source=ECHO, name="echo", dist="acme-echo", **metadata):
    module = dist.replace("-", "_")
    site.dist(dist, {"tensorway.command": {name: f"{module}:command"}}, **metadata)
    site.module(module, source)


def run(site, *arguments, **environment):
    done = site.run("-m", "tensorway", *arguments, **environment)
    assert "Traceback" not in done.stderr + done.stdout
    return done


def test_a_command_is_listed_from_metadata_alone(site):
    install(site, "raise AssertionError('it was imported')")
    done = run(site, "--help")
    assert exits.OK == done.returncode
    assert re.search(r"^ +echo +From acme-echo 1\.0\.$", done.stdout, re.MULTILINE)
    assert "--help" not in run(site, "why", "transport").stderr


def test_a_command_gets_the_words_after_its_name_and_the_output(site):
    install(site)
    done = run(site, "echo", "--size", "3", "x")
    assert (7, "Echoing ...\ngiven: ['--size', '3', 'x'], debug: False\n") == (done.returncode, done.stdout)


def test_json_and_debug_are_the_core_s_wherever_they_stand(site):
    install(site)
    done = run(site, "echo", "--json", "a", "--debug", "--", "--json")
    assert {"schema": "acme.echo/1", "arguments": ["a", "--", "--json"]} == json.loads(done.stdout)
    assert "Echoing ...\n" == done.stderr
    assert "debug: True" in run(site, "echo", "--debug").stdout


def test_what_a_command_refuses_is_three_lines_and_an_exit_code(site):
    install(site)
    done = run(site, "echo", "refuse")
    text = "BackendUnavailable: It was asked.\n  It cannot.\n  Ask another.\n"
    assert (exits.UNAVAILABLE, text, "") == (done.returncode, done.stderr, done.stdout)
    assert "tensorway.error/1" == json.loads(run(site, "echo", "refuse", "--json").stdout)["schema"]


def test_help_of_a_command_is_its_own(site):
    install(site)
    done = run(site, "echo", "help")
    assert (exits.OK, True) == (done.returncode, done.stdout.startswith("usage: tensorway echo"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise OSError('libx.so.1: no such file')", "raised OSError: libx.so.1: no such file"),
        ("import sys; sys.exit(0)", "raised SystemExit: 0"),
        ("import no_such_module_anywhere", "Install no_such_module_anywhere"),
        ("", "Its metadata is stale"),
        ("command = 3", "is of type int, not a function"),
        ("def command(arguments, out): return None", "returned None, which is no exit code"),
        ("def command(arguments, out): return 256", "returned 256, which is no exit code"),
        ("def command(arguments, out): return 1 / 0", "raised ZeroDivisionError"),
        ("def command(): return 0", "raised TypeError"),
    ],
)
def test_a_broken_command_is_three_lines_and_names_its_dist(site, source, words):
    install(site, source)
    done = run(site, "echo")
    assert (exits.BROKEN, 3) == (done.returncode, len(done.stderr.splitlines()))
    assert done.stderr.startswith("PluginDefect: The command 'echo' was asked for.")
    assert words in done.stderr
    assert "acme-echo 1.0" in done.stderr


def test_a_traceback_is_shown_when_it_is_asked_for(site):
    install(site, "def command(arguments, out): return 1 / 0")
    done = site.run("-m", "tensorway", "echo", "--debug")
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" in done.stderr


def test_a_command_for_another_plugin_api_is_not_imported(site):
    install(site, "raise AssertionError('it was imported')", api="99")
    done = run(site, "echo")
    assert (exits.BROKEN, True) == (done.returncode, "it was written for plugin API 99" in done.stderr)


def test_the_core_s_own_commands_come_first(site):
    install(site, "raise AssertionError('it was imported')", name="plugins")
    assert exits.OK == run(site, "plugins", "list").returncode
    assert 1 == run(site, "--help").stdout.count("    plugins ")


def test_two_dists_with_one_command_conflict_until_one_is_denied(site):
    install(site, dist="acme-one")
    install(site, dist="acme-two")
    done = run(site, "echo")
    assert (exits.UNAVAILABLE, True) == (done.returncode, "acme-one, acme-two" in done.stderr)
    assert "TENSORWAY_PLUGINS=-command:echo@acme-two" in done.stderr
    assert 7 == run(site, "echo", TENSORWAY_PLUGINS="-command:echo@acme-two").returncode


def test_a_command_can_be_denied_and_must_be_allowed_where_a_list_allows(site):
    install(site, "raise AssertionError('it was imported')")
    for value in ("-echo", "cpu"):
        done = run(site, "echo", TENSORWAY_PLUGINS=value)
        assert (exits.UNAVAILABLE, True) == (done.returncode, "TENSORWAY_PLUGINS leaves it out" in done.stderr), value
    assert exits.BROKEN == run(site, "echo", TENSORWAY_PLUGINS="command:echo").returncode
    assert exits.USAGE == run(site, "echo", TENSORWAY_PLUGINS="ecko").returncode


def test_a_command_of_an_extra_that_is_not_installed_says_how_to_get_it(monkeypatch, capsys):
    from tensorway import cli, plugins

    monkeypatch.setattr(scan, "scan", lambda: scan.Scan((), ()))
    with plugins.isolated():
        code = cli.main(["eplb", "plan"])
    assert exits.NOT_FOUND == code
    lines = capsys.readouterr().err.splitlines()
    assert "BackendNotFound: The command 'eplb' was asked for." == lines[0]
    assert 'Install what does: pip install "tensorway[eplb]"' == lines[2].strip()
    assert "eplb" in commands.EXTRAS


def test_commands_are_no_backends(site):
    install(site)
    found = site.scan()
    assert ((), ()) == (found.declarations, found.complaints)
    assert [("command", "echo", "acme-echo")] == [(row.kind, row.name, row.dist) for row in found.commands]


def test_the_list_of_our_commands_is_that_of_the_parser():
    from tensorway import cli

    (group,) = (action for action in cli._parser()._actions if action.dest == "command")
    assert cli.COMMANDS == tuple(group.choices)


@pytest.mark.parametrize("arguments", [("--json", "demo"), ("--", "demo"), ("nonsense",)])
def test_a_line_without_a_command_in_front_is_usage(site, arguments):
    done = run(site, *arguments)
    assert (exits.USAGE, True) == (done.returncode, "usage: tensorway" in done.stderr)


def test_benchmarks_are_no_backends_and_no_commands(site):
    site.dist("acme-bench", {"tensorway.bench": {"copies": "acme_bench:COPIES"}})
    found = site.scan()
    assert ((), (), ()) == (found.declarations, found.complaints, found.commands)
    assert [("bench", "copies", "acme-bench")] == [(row.kind, row.name, row.dist) for row in found.benches]
    assert ("TENSORWAY_PLUGINS leaves it out (denied)", "") == tuple(
        Host(found, Settings(deny=deny)).left_out(found.benches[0]) for deny in (("bench:copies",), ())
    )


def test_commands_below_offload_are_no_backends_and_no_commands(site):
    site.dist("acme-fs", {"tensorway.offload_command": {"ls": "acme_fs:ls"}})
    found = site.scan()
    assert ((), (), ()) == (found.declarations, found.complaints, found.commands)
    assert [("offload_command", "ls", "acme-fs")] == [(row.kind, row.name, row.dist) for row in found.offload_commands]
