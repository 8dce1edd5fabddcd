"""The secret of a deployment is in no report, no error and no command line, whatever is asked."""

from __future__ import annotations

import argparse
import re

import pytest

from tensorway import cli

SECRET = "correct-horse-battery-staple"
COMMANDS = [
    ("doctor", "--json"),
    ("doctor", "--debug"),
    ("plugins", "list", "--json"),
    ("plugins", "show", "direct", "--json"),
    ("why", "rendezvous", "--json"),
    ("environment", "--json"),
    ("environment",),
    ("rendezvous", "--seconds", "0.2", "--json"),
    ("rendezvous", "--status", "127.0.0.1:1", "--deadline", "0.2", "--debug"),
    ("rendezvous", "--status", "nowhere", "--deadline", "0.2", "--debug"),
    ("rendezvous", "--port", "99999", "--debug"),
    ("probe", "127.0.0.1:1", "--deadline", "0.2", "--debug"),
]


@pytest.mark.parametrize("given", ["variable", "file"])
def test_no_command_says_the_secret(site, given, tmp_path):
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    where = {"variable": {"TENSORWAY_SECRET": SECRET}, "file": {"TENSORWAY_SECRET_FILE": str(tmp_path / "secret")}}
    for command in COMMANDS:
        done = site.run("-m", "tensorway", *command, TENSORWAY_PLUGINS="direct,local", **where[given])
        assert done.stdout + done.stderr, command
        assert SECRET not in done.stdout + done.stderr, command


def test_a_check_and_what_it_writes_do_not_say_the_secret(site, tmp_path):
    site.good("alpha")
    report = tmp_path / "conformance.json"
    done = site.run("-m", "tensorway", "check", "alpha", "--output", str(report), "--debug", TENSORWAY_SECRET=SECRET)
    assert "Report:" in done.stdout
    assert SECRET not in done.stdout + done.stderr + report.read_text()


def options(parser):
    """Every option of every command."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options(below)


def test_no_option_takes_a_secret_which_every_user_of_the_host_could_read():
    found = {option for option in options(cli._parser()) if re.search("secret|password|token|key", option)}
    assert {"--secret-file"} == found


#: What a probe that is asked tells: how it was started.
TALKS = """
from pathlib import Path
from tensorway.types import Offer, ProbeResult
def probe():
    return ProbeResult.passed(Path("/proc/self/cmdline").read_text().replace(chr(0), " "))
def transport(ctx):
    return Offer("talks", "transport", "A test.", probe=probe, factory=lambda o, c: None)
"""


def test_the_process_of_a_probe_has_no_secret_in_its_command_line(site):
    site.bad("talks", TALKS)
    done = site.run("-m", "tensorway", "doctor", "--backend", "talks", TENSORWAY_SECRET=SECRET)
    assert "usable" in done.stdout and "-c" in done.stdout
    assert SECRET not in done.stdout + done.stderr
