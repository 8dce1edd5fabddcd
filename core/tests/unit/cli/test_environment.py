"""`tensorway environment`, for people and as JSON; it changes nothing."""

from __future__ import annotations

import io
import json

import pytest

from tensorway import cli, settings
from tensorway.cli import environment
from tensorway.cli.output import Output
from tensorway.rendezvous.environment import outgoing


@pytest.fixture
def told(monkeypatch):
    """What it prints in an environment of our making; nothing of ours is in it but that."""

    def run(policy="", as_json=False, **variables):
        monkeypatch.setattr(settings, "environment", lambda: dict(variables))
        monkeypatch.setattr(settings, "get", lambda name, default=None: variables.get(name, default))
        stream = io.StringIO()
        assert 0 == environment.run(Output(as_json, stream=stream), policy)
        return json.loads(stream.getvalue()) if as_json else stream.getvalue()

    return run


def test_it_says_what_travels_what_does_not_and_why_without_a_value(told):
    text = told(UCX_TLS="tcp-of-test", VLLM_HOST_IP="10.7.7.7", HF_TOKEN="hf_of_test", HOME="/home/of-test")
    assert text == (
        "travels\n  UCX_TLS\n"
        "is held back\n  a secret stays where it is: HF_TOKEN\n  true on one host only: VLLM_HOST_IP\n"
        "is not known here, and not ours to copy\n  1 variables; --json names them\n"
    )


def test_in_an_empty_environment_nothing_travels(told):
    assert told().startswith("travels\n  nothing\nis held back\n  nothing\n")


def test_what_leaked_here_is_said(told):
    driver = {"UCX_NET_DEVICES": "eth7"}
    variables = {**driver, **outgoing(driver, "head")}
    assert "and a worker drops it\n  UCX_NET_DEVICES\n" in told(**variables)
    assert ["UCX_NET_DEVICES"] == told(as_json=True, **variables)["leaked"]


def test_that_the_policy_is_off_is_said(told):
    text = told(TENSORWAY_ENVIRONMENT_POLICY="off", VLLM_HOST_IP="10.7.7.7")
    assert text.startswith("TENSORWAY_ENVIRONMENT_POLICY=off: all that is known travels but secrets")
    assert "VLLM_HOST_IP" in text.partition("is held back")[0]


def test_a_policy_is_resolved_here_and_what_the_user_set_otherwise_is_marked(told):
    text = told("any:loopback", UCX_NET_DEVICES="eth7\x1b[0m", GLOO_SOCKET_IFNAME="lo")
    assert "127.0.0.1 of lo, by any, loopback: binds 0.0.0.0, and tells others 127.0.0.1\n" in text
    assert "UCX_NET_DEVICES=lo (not so: eth7" in text and "\x1b" not in text
    assert "GLOO_SOCKET_IFNAME=lo\n" in text
    rows = told("any:loopback", as_json=True, UCX_NET_DEVICES="eth7")["address"]["variables"]
    assert {"name": "UCX_NET_DEVICES", "value": "lo", "set": "eth7"} in rows


def test_a_policy_that_gives_nothing_here_ends_with_the_code_for_usage(capsys):
    assert 2 == cli.main(["environment", "--host", "iface:none0"])
    assert "It fits no address. This host has:" in capsys.readouterr().err
