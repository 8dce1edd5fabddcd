"""`tensorway offload`: which words are whose."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tensorway import plugins
from tensorway.cli.output import Output
from tensorway.errors import BackendConflict, BackendNotFound, PluginDefect
from tensorway.plugins.scan import Declaration
from tensorway_offload.command import OWN, command, parser


def brought(name="ls", value=f"{__name__}:echo", dist="acme-fs"):
    return Declaration("offload_command", name, value, dist, "1.0", api=1)


@pytest.fixture
def among(monkeypatch):
    """Commands that are as good as installed."""

    def these(*rows):
        host = plugins.host()
        monkeypatch.setattr(host, "offload_commands", rows)

    with plugins.isolated():
        yield these


@pytest.fixture
def echo(monkeypatch):
    module = type(sys)("acme_echo_of_offload")
    module.command = lambda arguments, out: len(arguments)
    module.broken = lambda arguments, out: None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_what_another_dist_brings_is_run_with_the_words_after_it(among, echo):
    among(brought(value=f"{echo}:command"))
    assert 2 == command(["ls", "--long", "x"], Output())


def test_what_no_dist_brings_says_how_to_get_it(among):
    among()
    with pytest.raises(BackendNotFound) as caught:
        command(["verify", "folder"], Output())
    assert "offload verify" in caught.value.asked and "tensorway[fs]" in caught.value.to_do


def test_two_dists_that_bring_one_are_a_conflict_and_a_broken_one_is_its_dist_s(among, echo):
    among(brought(value=f"{echo}:command"), brought(value=f"{echo}:command", dist="acme-more"))
    with pytest.raises(BackendConflict):
        command(["ls"], Output())
    among(brought(value=f"{echo}:broken"))
    with pytest.raises(PluginDefect) as caught:
        command(["ls"], Output())
    assert "acme-fs" in caught.value.true


def test_our_own_words_are_ours_whatever_another_dist_says(among, echo, capsys):
    among(brought("replay", f"{echo}:command"))
    with pytest.raises(SystemExit):
        command(["replay", "--help"], Output())
    assert "usage: tensorway offload replay" in capsys.readouterr().out


def test_help_lists_what_others_bring_and_a_word_nobody_knows_is_usage(among, capsys):
    among(brought("ls"))
    with pytest.raises(SystemExit) as caught:
        command(["--help"], Output())
    assert 0 == caught.value.code and "From acme-fs 1.0." in capsys.readouterr().out
    for words in ([], ["dance"]):
        with pytest.raises(SystemExit) as caught:
            command(words, Output())
        assert 2 == caught.value.code


@pytest.mark.parametrize("text", ["", "0", "0%", "-1", "101%", "1%,,3%", "inf", "\u0661%", ",".join(["1"] * 101)])
def test_capacities_that_mean_nothing_are_usage(text):
    with pytest.raises(SystemExit):
        parser().parse_args(["replay", "trace", f"--capacities={text}"])


def test_it_is_a_command_of_tensorway():
    done = subprocess.run(
        [sys.executable, "-m", "tensorway", "offload", "--help"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert 0 == done.returncode and all(word in done.stdout for word in OWN)
