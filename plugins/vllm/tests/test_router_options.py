"""What operators give the router, on the command line, in a file and on the page that shows them how."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from tensorway.cli.output import Output
from tensorway.errors import AddressInvalid, BackendUnavailable, OptionsInvalid
from tensorway.plugins.options import fitted
from tensorway_vllm.handover.options import HandoverOptions
from tensorway_vllm.router import command
from tensorway_vllm.router.options import RouterOptions, options_of, read

URL = "http://127.0.0.1:8100"
needs_aiohttp = pytest.mark.skipif(
    importlib.util.find_spec("aiohttp") is None, reason='needs aiohttp: pip install "tensorway-vllm[router]"'
)


def page():
    path = Path(__file__).parents[3] / "docs" / "vllm-router.md"
    return path.read_text(encoding="utf-8")


def parsed(words):
    parser = argparse.ArgumentParser(prog="tensorway vllm router")
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "'decode' has no default"),
        ({"decode": []}, "no decode engine is named"),
        ({"decode": [URL], "decoder": [URL]}, "no option 'decoder'"),
        ({"decode": URL}, "'decode'"),
        ({"decode": [URL, URL]}, "is named twice"),
        ({"decode": [URL], "prefill": [f"{URL}/"]}, "is named twice"),
        ({"decode": [URL], "port": 70_000}, "'port'"),
        ({"decode": [URL], "port": "http"}, "'port'"),
        ({"decode": [URL], "choice": "best"}, "'choice'"),
        ({"decode": [URL], "request_seconds": 0}, "'request_seconds'"),
        ({"decode": [URL], "request_seconds": float("nan")}, "'request_seconds'"),
        ({"decode": [URL], "attempts": 0}, "'attempts'"),
        *(
            ({"decode": [url]}, "give it as http://host:port")
            for url in (
                "",
                "127.0.0.1:8100",
                "ftp://a",
                "http://",
                "http://a:b",
                "http://a:0",
                "http://a:99999",
                "http://a/v1",
                "http://a?x=1",
                "http://a\n",
                "http://é",
                "http://[::1",
            )
        ),
    ],
)
def test_what_cannot_be_meant_is_an_error_that_names_it(given, says):
    with pytest.raises(OptionsInvalid) as error:
        options_of(given)
    assert says in str(error.value)


def test_a_password_in_an_url_is_refused_and_not_repeated():
    with pytest.raises(OptionsInvalid) as error:
        options_of({"decode": ["http://me:hunter2@a:8000"]})
    assert "has a user or a password" in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b'{"a":' * 100_000, None])
def test_a_file_that_is_no_json_object_is_an_error(tmp_path, text):
    path = tmp_path / "router.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(OptionsInvalid, match=r"router\.json"):
        read(path)


def test_every_option_is_on_the_command_line_and_counts_more_there_than_in_the_file(tmp_path, monkeypatch):
    served = []

    async def serve(options, out):
        served.append(options)
        return 0

    monkeypatch.setattr(command, "_serve", serve)
    pytest.importorskip("aiohttp", reason='needs aiohttp: pip install "tensorway-vllm[router]"')
    path = tmp_path / "router.json"
    path.write_text(json.dumps({"decode": ["http://a:1"], "prefill": ["http://b:1"], "most": 3, "port": 1}))
    words = ["--config", str(path), "--decode", "http://c:1", "--decode", "http://d:1", "--port", "9", "--host", "::1"]
    assert 0 == command.run(parsed(words), Output())
    [options] = served
    assert (options.decode, options.prefill) == (("http://c:1", "http://d:1"), ("http://b:1",))
    assert (options.most, options.port, options.host) == (3, 9, "::1")


def test_without_aiohttp_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(BackendUnavailable) as error:
        command.run(parsed(["--decode", URL]), Output())
    assert error.value.to_do == 'pip install "tensorway-vllm[router]"'


def test_the_page_has_each_option_with_its_default_and_its_words():
    rows = re.findall(r"^\| `--([\w-]+)` \| (\S*) ?\| (.+) \|$", page(), re.MULTILINE)
    shown = {name.replace("-", "_"): (default, text) for name, default, text in rows}
    known = {}
    for field in attrs.fields(RouterOptions):
        default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        known[field.name] = ("" if field.name in ("decode", "prefill") else default, command._HELP[field.name][1])
    assert known == shown


def test_the_file_on_the_page_is_one():
    [text] = re.findall(r"```json\n(.*?)```", page(), re.DOTALL)
    assert options_of(json.loads(text)).prefill_seconds == 20


def started():
    """The lines of the start on the page: words of each command."""
    [text] = re.findall(r"```text\n(.*?)```", page(), re.DOTALL)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="\n&")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    lines, words = [], []
    for word in lexer:
        if set(word) <= {"\n", "&"}:
            lines.append(words)
            words = []
        else:
            words.append(word)
    return [line for line in (*lines, words) if line]


def test_the_start_on_the_page_is_what_the_commands_take():
    _, _, kv, *engines, router = started()
    config = json.loads(kv[0].removeprefix("KV="))
    assert config["kv_connector"] == "TensorwayConnector"
    assert config["kv_load_failure_policy"] == "recompute"
    extra = config["kv_connector_extra_config"]
    assert fitted(HandoverOptions, extra, "", "").rendezvous_options == {"address": "127.0.0.1:7400"}
    ports = {f"http://127.0.0.1:{words[words.index('--port') + 1]}" for words in engines}
    assert all(words[:2] == ["vllm", "serve"] and words[-2:] == ["--kv-transfer-config", "$KV"] for words in engines)
    assert router[:3] == ["tensorway", "vllm", "router"]
    given = parsed(router[3:])
    assert {*given.prefill, *given.decode} == ports
    assert options_of({"prefill": given.prefill, "decode": given.decode})


def test_the_rendezvous_on_the_page_runs():
    [words] = [words for words in started() if words[:2] == ["tensorway", "rendezvous"]]
    environment = {**os.environ, "TENSORWAY_SECRET": "known to all of this deployment"}
    assert words[2:] == ["--port", "7400"]
    command = [sys.executable, "-m", "tensorway", "rendezvous", "--port", "0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert re.fullmatch(r"Holding records at 127\.0\.0\.1:\d+ .*\n", process.stdout.readline())
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


@needs_aiohttp
def test_it_says_where_it_listens_and_ends_when_it_is_told_to():
    words = [sys.executable, "-m", "tensorway", "vllm", "router", "--decode", "http://127.0.0.1:9", "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert re.fullmatch(r"Listening at http://127\.0\.0\.1:\d+\.\n", process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (told, process.returncode) == ("Taking no more requests.\n", 0)


@needs_aiohttp
def test_a_port_that_is_taken_is_an_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(AddressInvalid, match=port):
            command.run(parsed(["--decode", "http://127.0.0.1:9", "--port", port]), Output())
