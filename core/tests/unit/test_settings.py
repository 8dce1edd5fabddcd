"""The environment is read in one place, and what cannot be meant is refused there."""

from __future__ import annotations

import os
import traceback

import pytest

from tensorway import settings
from tensorway.errors import SettingInvalid
from tensorway.settings import Settings, from_environment


def test_an_empty_environment_gives_the_defaults():
    assert Settings() == from_environment({})


def test_every_variable_is_read():
    environ = {
        "TENSORWAY_PLUGINS": " nixl , -rixl,transport:cpu@acme ,",
        "TENSORWAY_STRICT": "yes",
        "TENSORWAY_PROBE_TIMEOUT": "2.5",
        "TENSORWAY_LOCAL_RANK": "3",
    }
    # Secrets are read when somebody asks for them, and kept nowhere; policies are those of the environment they are in;
    # what is for tests is read by tests; and where metrics are shown is asked by whoever has some.
    elsewhere = {
        "TENSORWAY_SECRET",
        "TENSORWAY_SECRET_FILE",
        "TENSORWAY_HOST",
        "TENSORWAY_METRICS",
        "TENSORWAY_ENVIRONMENT_POLICY",
        "TENSORWAY_ENVIRONMENT_OF",
        "TENSORWAY_REQUIRE_MULTIHOST",
    }
    assert set(environ) == set(settings.VARIABLES) - elsewhere
    expected = Settings(("nixl", "transport:cpu@acme"), ("rixl",), strict=True, probe_timeout=2.5, local_rank=3)
    assert expected == from_environment(environ)


def test_a_secret_comes_from_its_variable_or_else_from_its_file(monkeypatch, tmp_path):
    for name in ("TENSORWAY_SECRET", "TENSORWAY_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert settings.secret() == ""
    (tmp_path / "secret").write_text("from the file\n")
    monkeypatch.setenv("TENSORWAY_SECRET_FILE", str(tmp_path / "secret"))
    assert settings.secret() == "from the file"
    monkeypatch.setenv("TENSORWAY_SECRET", "from the variable")
    assert settings.secret() == "from the variable"
    monkeypatch.delenv("TENSORWAY_SECRET")
    monkeypatch.setenv("TENSORWAY_SECRET_FILE", str(tmp_path / "nothing"))
    with pytest.raises(SettingInvalid, match="cannot be read"):
        settings.secret()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TENSORWAY_STRICT", "maybe"),
        ("TENSORWAY_PROBE_TIMEOUT", "soon"),
        ("TENSORWAY_PROBE_TIMEOUT", "0"),
        ("TENSORWAY_PROBE_TIMEOUT", "-1"),
        ("TENSORWAY_PROBE_TIMEOUT", "inf"),
        ("TENSORWAY_PROBE_TIMEOUT", "nan"),
        ("TENSORWAY_PLUGINS", "nixl,-"),
        ("TENSORWAY_LOCAL_RANK", "first"),
        ("TENSORWAY_LOCAL_RANK", "-1"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(name, value):
    with pytest.raises(SettingInvalid) as caught:
        from_environment({name: value})
    assert f"{name}={value!r} was set." == caught.value.asked


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"])
def test_the_launchers_rank_is_understood(name):
    assert 5 == from_environment({name: "5"}).local_rank


def test_a_launchers_nonsense_is_not_our_error():
    assert 0 == from_environment({"LOCAL_RANK": "n/a"}).local_rank


def test_our_rank_counts_before_the_launchers():
    assert 1 == from_environment({"TENSORWAY_LOCAL_RANK": "1", "LOCAL_RANK": "2"}).local_rank


def test_a_misspelt_variable_is_found_with_the_one_that_is_meant():
    found = settings.unknown_variables(
        {"TENSORWAY_PLUGIN": "x", "TENSORWAY_STRICT": "1", "TENSORWAY_Q": "", "PATH": "x"}
    )
    assert {"TENSORWAY_PLUGIN": "TENSORWAY_PLUGINS", "TENSORWAY_Q": None} == found


def test_a_default_is_set_only_where_the_user_set_nothing(monkeypatch):
    monkeypatch.setenv("UCX_TEST_SET", "theirs")
    monkeypatch.delenv("UCX_TEST_UNSET", raising=False)
    assert (False, True) == (
        settings.set_default("UCX_TEST_SET", "ours"),
        settings.set_default("UCX_TEST_UNSET", "ours"),
    )
    assert ("theirs", "ours") == (settings.get("UCX_TEST_SET"), settings.get("UCX_TEST_UNSET"))
    monkeypatch.delenv("UCX_TEST_UNSET")


def test_a_blank_variable_is_unset(monkeypatch):
    monkeypatch.setenv("UCX_TEST_BLANK", " ")
    assert settings.set_default("UCX_TEST_BLANK", "ours")
    assert "ours" == settings.get("UCX_TEST_BLANK")


def test_what_is_removed_is_gone_and_what_was_not_there_is_no_error(monkeypatch):
    monkeypatch.setenv("UCX_TEST_SET", "theirs")
    settings.unset(["UCX_TEST_SET", "UCX_TEST_UNSET"])
    assert None is settings.get("UCX_TEST_SET")


@pytest.mark.parametrize(("environ", "expected"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_a_terminal_may_refuse_color(environ, expected):
    assert expected is settings.terminal(environ)


def _pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "true"),
    [
        (_pipe, "it is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is no regular file"),
        (lambda path: path.write_bytes(b"x" * 65_537), "it has more than 65,536 bytes"),
        (lambda path: path.write_bytes(b"hunter2\xff"), "it is not text in UTF-8"),
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory|no regular file"),
    ],
    ids=["a pipe", "a device", "too much", "no text", "absent", "a folder"],
)
def test_a_file_that_can_hold_no_secret_is_refused_at_once_and_not_repeated(make, true, tmp_path, monkeypatch):
    make(tmp_path / "secret")
    monkeypatch.delenv("TENSORWAY_SECRET", raising=False)
    monkeypatch.setenv("TENSORWAY_SECRET_FILE", str(tmp_path / "secret"))
    with pytest.raises(SettingInvalid, match=true) as caught:
        settings.secret()
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_secret_that_is_no_text_is_refused_and_not_repeated(monkeypatch):
    monkeypatch.setenv("TENSORWAY_SECRET", "hunter2-hunter2-\udcff")
    with pytest.raises(SettingInvalid, match="not text in UTF-8") as caught:
        settings.secret()
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
