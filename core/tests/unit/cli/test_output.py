"""Plain text fits 80 columns, color is for terminals, and JSON is one object."""

from __future__ import annotations

import io
import json

from tensorway.cli.output import Output, wrapped


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_text_is_wrapped_at_80_columns_and_commands_stay_whole():
    url = "--find-links=" + "x" * 100
    lines = wrapped("word " * 40 + url, indent=6)
    assert all(len(line) <= 80 for line in lines if url not in line)
    assert all(line.startswith("      ") for line in lines)
    assert any(url in line for line in lines)


def test_color_goes_to_a_terminal_only(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[32mok\x1b[0m" == Output(stream=Terminal()).paint("ok", "good")
    assert "ok" == Output(stream=io.StringIO()).paint("ok", "good")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "ok" == Output(stream=Terminal()).paint("ok", "good")


def test_json_is_the_only_thing_on_the_stream():
    stream, notes = io.StringIO(), io.StringIO()
    out = Output(as_json=True, stream=stream, notes=notes)
    out.progress("working ...")
    out.line("for people")
    out.text("for people")
    out.json("tensorway.test/1", {"a": 1})
    assert {"schema": "tensorway.test/1", "a": 1} == json.loads(stream.getvalue())
    assert "working ...\n" == notes.getvalue()


def test_without_json_no_json_is_written():
    stream = io.StringIO()
    Output(stream=stream).json("tensorway.test/1", {})
    assert "" == stream.getvalue()


def test_what_is_done_right_now_is_one_line_of_a_terminal_and_each_time_a_line_elsewhere(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        out = Output(stream=stream)
        out.live("half of it " + "x" * 100, 0.5)
        out.live("nobody knows")
        out.live()
    long = ("[########........] half of it " + "x" * 100)[:39]
    assert f"\r{long}\x1b[K\rnobody knows\x1b[K\r\x1b[K" == terminal.getvalue()
    assert f"    half of it {'x' * 100}\n    nobody knows\n" == file.getvalue()


def test_what_is_done_right_now_is_beside_json():
    stream, notes = io.StringIO(), io.StringIO()
    Output(as_json=True, stream=stream, notes=notes).live("half of it", 0.5)
    assert ("", "    half of it\n") == (stream.getvalue(), notes.getvalue())
