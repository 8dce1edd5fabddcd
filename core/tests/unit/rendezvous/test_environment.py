"""Which variables travel: by scope, whatever way they came; what a worker drops; and what is said of it."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as trials
from hypothesis import strategies as st

from tensorway import _logging, settings
from tensorway.errors import SettingInvalid
from tensorway.rendezvous.environment import (
    POLICY,
    STAMP,
    VARIABLES,
    Variable,
    cache_key,
    leaked,
    outgoing,
    report,
    sanitize,
    scope_of,
)

DRIVER = {
    "UCX_TLS": "tcp",
    "UCX_NET_DEVICES": "eth7",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.77.0.1",
    "VLLM_P2P_SIDE_CHANNEL_HOST": "10.77.0.1",
    "VLLM_NIXL_SIDE_CHANNEL_PORT": "5600",
    "CUDA_VISIBLE_DEVICES": "0",
    "TENSORWAY_SECRET": "do not tell",
    "AWS_SECRET_ACCESS_KEY": "do not tell either",
    "HOME": "/home/driver",
    "TENSORWAY_PLUGINS": "nixl",
}


def travels(environment, **more):
    return {name: value for name, value in outgoing({**environment, **more}, "driver").items() if name != STAMP}


# -- what travels


def test_only_what_is_true_in_the_cluster_travels():
    assert travels(DRIVER) == {"UCX_TLS": "tcp", "TENSORWAY_PLUGINS": "nixl"}


def test_the_address_of_the_first_host_is_true_in_the_cluster_though_it_is_that_host_s_own():
    assert "10.77.0.1" == travels({"MASTER_ADDR": "10.77.0.1", "VLLM_HOST_IP": "10.77.0.1"})["MASTER_ADDR"]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("redis://do not tell@host", "its value holds that of TENSORWAY_SECRET"),
        ("http://admin:guess@etcd:2379", "its value holds a password"),
        ("${TENSORWAY_SECRET}", "it refers to other variables, which Ray would fill in on the node"),
        ("/logs/$HOSTNAME", "it refers to other variables, which Ray would fill in on the node"),
        (" ", "blank, which means unset"),
        ("short", "its value holds that of OF_A_TEST_TOKEN"),
    ],
)
def test_what_would_be_wrong_elsewhere_is_held_back(value, why):
    environment = {**DRIVER, "NIXL_ETCD_ENDPOINTS": value, "OF_A_TEST_TOKEN": "short"}
    assert "NIXL_ETCD_ENDPOINTS" not in outgoing(environment)
    (verdict,) = [each for each in report(environment).verdicts if each.name == "NIXL_ETCD_ENDPOINTS"]
    assert ("held", "cluster", why) == (verdict.fate, verdict.scope, verdict.why)


@pytest.mark.parametrize("value", ["shorter", "100$", "http://etcd:2379", "a@b:c"])
def test_what_only_looks_like_it_travels(value):
    assert value == travels({"NIXL_ETCD_ENDPOINTS": value, "OF_A_TEST_TOKEN": "short"})["NIXL_ETCD_ENDPOINTS"]


def test_a_stamp_is_not_copied_on():
    first = outgoing(DRIVER, "driver")
    assert json.loads(outgoing({**first, "UCX_TLS": "tcp"}, "second")[STAMP])["host"] == "second"


def test_a_report_says_of_each_variable_what_becomes_of_it_and_why():
    made = report({**outgoing(DRIVER, "elsewhere"), **DRIVER})
    assert ["HOME"] == made.names("unknown")
    assert ["TENSORWAY_PLUGINS", "UCX_TLS"] == made.names("travels")
    why = {each.name: each.why for each in made.verdicts if each.fate == "held"}
    assert "true on one host only" == why["UCX_NET_DEVICES"] == why["VLLM_P2P_SIDE_CHANNEL_HOST"]
    assert "true for one process only" == why["CUDA_VISIBLE_DEVICES"]
    assert "a secret stays where it is" == why["TENSORWAY_SECRET"]
    assert str(made).endswith(": 7 held, 1 unknown, 2 travels")
    assert json.loads(json.dumps(made.plain()))["variables"][-1] == {
        "name": "VLLM_P2P_SIDE_CHANNEL_HOST",
        "fate": "held",
        "scope": "host",
        "why": "true on one host only",
    }


# -- what a worker drops


def test_the_study_s_leak_is_dropped_whatever_way_it_came_and_said_in_one_line(caplog):
    _logging.forget()
    worker = {**DRIVER, **outgoing(DRIVER, "head 123 net:[4]"), "PATH": "/bin"}  # a job-level environment copied all
    dropped = ["UCX_NET_DEVICES", "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_P2P_SIDE_CHANNEL_HOST"]
    assert dropped == leaked(worker, "worker")
    before = dict(worker)
    made = sanitize(worker, "worker")
    assert dropped == made.names("dropped") == sorted(before.keys() - worker.keys())
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f": {', '.join(dropped)} (the value of head, where its launcher runs); " in said
    assert said.endswith("; what is true on every host travels with TENSORWAY_ENVIRONMENT_POLICY=NAME=cluster")
    assert "\n" not in said and "10.77.0.1" not in said and "eth7" not in said


def test_what_two_hosts_may_have_alike_is_no_leak():
    alike = "CUDA_VISIBLE_DEVICES LOCAL_RANK VLLM_DP_RANK_LOCAL VLLM_NIXL_SIDE_CHANNEL_PORT VLLM_CPU_OMP_THREADS_BIND"
    driver = dict.fromkeys([*alike.split(), "VLLM_DP_RANK"], "0")
    worker = {**driver, **outgoing(driver, "driver")}
    assert ["VLLM_DP_RANK"] == sanitize(worker, "worker").names("dropped")
    assert set(alike.split()) <= worker.keys()


def test_what_the_operator_set_for_this_host_stays():
    worker = {**outgoing(DRIVER, "driver"), "UCX_NET_DEVICES": "ib0", "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.77.0.2"}
    before = dict(worker)
    assert ([], before) == (sanitize(worker, "worker").names("dropped"), worker)


def test_what_the_operator_says_is_true_on_every_host_travels_and_stays():
    driver = {**DRIVER, POLICY: "UCX_NET_DEVICES=cluster"}
    copied = outgoing(driver, "driver")
    assert "eth7" == copied["UCX_NET_DEVICES"]
    worker = {**driver, **copied}
    assert "UCX_NET_DEVICES" not in sanitize(worker, "worker").names("dropped")


def test_on_the_launcher_s_own_host_nothing_has_leaked():
    assert leaked({**DRIVER, **outgoing(DRIVER, "driver")}, "driver") == []


def test_a_blank_address_is_dropped_because_some_take_it_for_one():
    worker = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "", "UCX_NET_DEVICES": " ", "CUDA_VISIBLE_DEVICES": "", "EDITOR": ""}
    made = sanitize(worker, "worker")
    assert {"CUDA_VISIBLE_DEVICES": "", "EDITOR": ""} == worker
    assert {"blank, which means unset"} == {each.why for each in made.verdicts}


def test_without_an_environment_it_is_this_process_s_own(monkeypatch):
    for name, value in {**DRIVER, **outgoing(DRIVER, "head")}.items():
        monkeypatch.setenv(name, value)
    assert ["UCX_NET_DEVICES", "VLLM_NIXL_SIDE_CHANNEL_HOST"] == sanitize().names("dropped")[:2]
    assert (None, "tcp") == (settings.get("UCX_NET_DEVICES"), settings.get("UCX_TLS"))
    assert [] == sanitize().names("dropped")


def test_with_the_policy_off_the_bug_is_back_and_secrets_still_do_not_travel():
    driver = {**DRIVER, POLICY: "off"}
    copied = outgoing(driver, "driver")
    assert "10.77.0.1" == copied["VLLM_NIXL_SIDE_CHANNEL_HOST"]
    assert STAMP not in copied and "do not tell" not in json.dumps(copied)
    worker = {**driver, **outgoing(DRIVER, "driver")}
    assert ([], "eth7") == (sanitize(worker, "worker").names("dropped"), worker["UCX_NET_DEVICES"])


def test_a_policy_that_cannot_be_meant_is_an_error_and_not_a_default():
    for call in (outgoing, report, leaked, sanitize):
        with pytest.raises(SettingInvalid):
            call({POLICY: "of"})


# -- what others wrote

_DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "stamp",
    [
        "",
        "{",
        "[]",
        "1",
        '{"left": 1}',
        '{"host": "x", "left": [1]}',
        "null",
        "\udcff",
        '{"host": 1, "left": {}}',
        _DEEP,
    ],
)
def test_a_stamp_that_is_none_says_nothing(stamp):
    assert leaked({STAMP: stamp, "UCX_NET_DEVICES": "eth0"}, "worker") == []


def test_a_stamp_cannot_have_secrets_or_what_is_true_in_the_cluster_dropped():
    stamp = json.loads(outgoing({"UCX_NET_DEVICES": "tcp"}, "driver")[STAMP])
    stamp["left"] = dict.fromkeys(["UCX_TLS", "HF_TOKEN"], stamp["left"]["UCX_NET_DEVICES"])
    assert [] == leaked({STAMP: json.dumps(stamp), "UCX_TLS": "tcp", "HF_TOKEN": "tcp"}, "worker")


def test_a_host_that_a_stamp_made_up_is_not_printed():
    worker = {"UCX_NET_DEVICES": "eth7"}
    stamp = json.loads(outgoing(worker, "driver")[STAMP])
    worker[STAMP] = json.dumps({**stamp, "host": "\x1b[31m\n" + "x" * 200})
    assert "the value of another host," in str(sanitize(worker, "worker"))


# -- whatever an environment holds

_REST = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789", max_size=6)
_NAMES = st.one_of(
    st.builds(
        "{}{}".format, st.sampled_from(["UCX_", "NCCL_", "VLLM_", "MC_", "TENSORWAY_", "SLURM_", "NIXL_", "X"]), _REST
    ),
    st.sampled_from(["UCX_NET_DEVICES", "VLLM_HOST_IP", "MASTER_ADDR", "LOCAL_RANK", "VLLM_DP_RANK", "POD_IP"]),
    st.builds("{}{}".format, _REST, st.sampled_from(["_TOKEN", "_API_KEY", "_SECRET", "_HOST_IP", "_SOCKET_IFNAME"])),
    st.text(st.characters(exclude_characters="=\0"), min_size=1, max_size=8),
).filter(lambda name: name not in (STAMP, POLICY))
#: Of letters of which neither names nor our own words are.
_WORDS = st.text("αβγδεζ", min_size=8, max_size=20)
_ENVIRONMENTS = st.dictionaries(_NAMES, st.one_of(_WORDS, st.text(max_size=3), st.just("")), max_size=8)


@trials(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(environment=_ENVIRONMENTS, told=st.data())
def test_nothing_that_is_not_true_in_the_cluster_is_in_what_travels(environment, told):
    apart = {name: value for name, value in environment.items() if scope_of(name) in ("host", "rank", "secret")}
    secrets = [value for name, value in apart.items() if scope_of(name) == "secret" and len(value) >= 8]
    if secrets:  # somebody wrote one of them into another variable
        secret = told.draw(st.sampled_from(secrets))
        environment = {**environment, "UCX_LOG_FILE": f"{secret}.log", "NIXL_X": secret}
    copied = outgoing(environment, "driver")
    assert not copied.keys() & apart.keys()
    assert not copied.keys() & {name for name in environment if scope_of(name) is None}
    whole = [*copied, *copied.values(), *json.loads(copied[STAMP])["left"]]
    assert [] == [secret for secret in secrets if any(secret in text for text in whole)]
    # And no digest of one: what the stamp holds is of variables that are true on a host, and no secrets.
    assert not {"secret", "cluster", None} & {scope_of(name) for name in json.loads(copied[STAMP])["left"]}
    others = [value for name, value in environment.items() if scope_of(name) == "cluster"]
    alone = [value for value in apart.values() if len(value) >= 8 and all(value not in other for other in others)]
    assert [] == [value for value in alone if any(value in text for text in copied.values())]
    assert json.dumps(report(environment).plain()) == json.dumps(report(environment).plain())


@trials(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(environment=_ENVIRONMENTS)
def test_a_report_shows_no_value(environment):
    shown = f"{json.dumps(report(environment).plain(), ensure_ascii=False)} {report(environment)}"
    assume(all(value not in " ".join(environment) for value in environment.values() if len(value) >= 8))
    assert [] == [value for value in environment.values() if len(value) >= 8 and value in shown]


@trials(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(driver=_ENVIRONMENTS, own=_ENVIRONMENTS)
def test_to_sanitize_twice_is_to_do_it_once_and_what_was_set_for_a_host_survives(driver, own):
    worker = {**driver, **own, **outgoing(driver, "driver")}
    before = dict(worker)
    sanitize(worker, "worker")
    once = dict(worker)
    assert [] == sanitize(worker, "worker").names("dropped")
    assert once == worker
    gone = before.keys() - once.keys()
    assert {name for name in gone if before[name].strip()} <= {
        name for name in driver if scope_of(name) in ("host", "rank") and driver[name] == before[name]
    }
    assert all(once[name] == before[name] for name in once)


# -- what depends on it


def test_only_what_opted_in_is_part_of_a_cache_key():
    variables = (Variable("LAYOUT", "cluster", cache_key=True), *VARIABLES)
    key = cache_key({"LAYOUT": "HND", "UCX_TLS": "tcp"}, variables)
    assert key == cache_key({"LAYOUT": "HND", "UCX_TLS": "rc"}, variables)
    assert key != cache_key({"LAYOUT": "NHD", "UCX_TLS": "tcp"}, variables)
    assert cache_key({}, variables) == cache_key({"LAYOUT": ""}, variables)


def test_a_pattern_that_opted_in_does_not_bring_what_differs_by_host_into_the_cache_key():
    variables = (Variable("UCX_NET_DEVICES", "host"), Variable("UCX_*", "cluster", cache_key=True))
    assert cache_key({"UCX_TLS": "rc"}, variables) == cache_key({"UCX_TLS": "rc", "UCX_NET_DEVICES": "eth0"}, variables)
