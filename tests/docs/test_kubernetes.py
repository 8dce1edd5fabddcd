"""The manifests are valid, agree with each other and with the programs, and what they run does what they say."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tensorway import cli, settings
from tensorway.plugins.options import fitted
from tensorway.testing.servers import free_port
from tensorway_kv.options import HandoverOptions as Handover
from tensorway_nixl.options import NixlOptions
from tensorway_vllm.handover.options import HandoverOptions
from tensorway_vllm.router import command as router
from tensorway_vllm.router.options import options_of

FOLDER = Path(__file__).parents[2] / "docs" / "kubernetes"
DOCUMENTS = {
    f"{path.stem} {document['kind']} {document['metadata']['name']}": document
    for path in sorted(FOLDER.glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text("utf-8"))
}
WORKLOADS = {name: each for name, each in DOCUMENTS.items() if each["kind"] in ("Deployment", "StatefulSet")}
SERVICES = {each["metadata"]["name"]: each["spec"] for each in DOCUMENTS.values() if each["kind"] == "Service"}
POLICIES = {each["metadata"]["name"]: each["spec"] for each in DOCUMENTS.values() if each["kind"] == "NetworkPolicy"}
CONFIGS = {each["metadata"]["name"]: each["data"] for each in DOCUMENTS.values() if each["kind"] == "ConfigMap"}


def pod(workload):
    return workload["spec"]["template"]["spec"]


CONTAINERS = {
    f"{name}: {container['name']}": container
    for name, workload in WORKLOADS.items()
    for container in (*pod(workload).get("initContainers", ()), *pod(workload)["containers"])
}


def environment(container):
    """Its variables; one that comes from the cluster has the path of the field as its value."""
    found = {
        name: text
        for source in container.get("envFrom", ())
        for name, text in CONFIGS[source["configMapRef"]["name"]].items()
    }
    for each in container.get("env", ()):
        found[each["name"]] = each["value"] if "value" in each else each["valueFrom"]["fieldRef"]["fieldPath"]
    return found


def words(container):
    """The command that is run, with `$(NAME)` replaced as Kubernetes does."""
    values = environment(container)
    return [
        re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word)
        for word in (*container["command"], *container.get("args", ()))
    ]


def commands(container):
    """All commands of a container: the one that it runs, and those of its probes."""
    probes = (container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in container)
    return [words(container), *(probe["exec"]["command"] for probe in probes if "exec" in probe)]


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_manifest_is_what_kubernetes_takes(name, version):
    kubernetes_validate.validate(DOCUMENTS[name], version, strict=True)


def test_the_validator_refuses_what_is_wrong():
    wrong = json.loads(json.dumps(DOCUMENTS["rendezvous Deployment tensorway-rendezvous"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_selects_its_own_pods_and_has_what_it_mounts(name):
    workload = WORKLOADS[name]
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
    volumes = {volume["name"] for volume in pod(workload).get("volumes", ())}
    for container in pod(workload)["containers"]:
        mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", ())}
        assert mounts.keys() == volumes
        if file := environment(container).get("TENSORWAY_SECRET_FILE"):
            assert file.startswith(f"{mounts['secret']}/")
    if workload["kind"] == "StatefulSet":
        assert SERVICES[workload["spec"]["serviceName"]]["clusterIP"] == "None"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_selects_pods_that_have_the_ports_it_names(name):
    service = SERVICES[name]
    selected = [
        workload
        for workload in WORKLOADS.values()
        if service["selector"].items() <= workload["spec"]["template"]["metadata"]["labels"].items()
    ]
    assert selected
    for workload in selected:
        ports = {port["name"] for each in pod(workload)["containers"] for port in each.get("ports", ())}
        assert {port["targetPort"] for port in service["ports"]} <= ports


def admitted(port, workload):
    """The workloads whose pods the policies let in at a port of another's, by name; None for everybody."""
    found = set()
    for policy in POLICIES.values():
        if not selects(policy["podSelector"], workload):
            continue
        for rule in policy["ingress"]:
            if all(each["port"] != port for each in rule.get("ports", ({"port": port},))):
                continue
            if "from" not in rule:
                return None
            pods = [each["podSelector"] for each in rule["from"] if "podSelector" in each]
            found |= {name for name, each in WORKLOADS.items() if any(selects(pod, each) for pod in pods)}
    return found


def selects(selector, workload):
    return selector["matchLabels"].items() <= workload["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_about_pods_that_are_there_and_ports_that_they_have(name):
    policy = POLICIES[name]
    about = [each for each in WORKLOADS.values() if selects(policy["podSelector"], each)]
    assert about and policy["policyTypes"] == ["Ingress"]
    ports = {port["name"] for each in about for container in pod(each)["containers"] for port in container["ports"]}
    for rule in policy["ingress"]:
        assert {each["port"] for each in rule.get("ports", ())} <= ports
        for source in rule.get("from", ()):
            if "podSelector" in source:
                assert any(selects(source["podSelector"], each) for each in WORKLOADS.values())


def test_only_engines_reach_the_rendezvous_and_each_other_s_side_channels():
    engines = {name for name in WORKLOADS if name.startswith("engines ")}
    router = {name for name in WORKLOADS if name.startswith("router ")}
    for name, workload in WORKLOADS.items():
        assert any(selects(policy["podSelector"], workload) for policy in POLICIES.values()), "all may reach it"
        if name in engines:
            assert admitted("any other", workload) == engines
            assert admitted("http", workload) == engines | router
    assert admitted("rendezvous", WORKLOADS["rendezvous Deployment tensorway-rendezvous"]) == engines
    assert admitted("http", WORKLOADS["router Deployment tensorway-router"]) is None


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_variable_of_ours_exists_and_the_pod_s_address_comes_from_the_cluster(name):
    container = CONTAINERS[name]
    given = environment(container)
    assert {each for each in given if each.startswith("TENSORWAY_")} <= set(settings.VARIABLES)
    text = json.dumps([container, list(given.values())])
    if '"runtime' in text or ":runtime" in text or r"\"runtime" in text:
        assert given["POD_IP"] == "status.podIP"
    assert "TENSORWAY_SECRET" not in given, "a secret in an environment is shown to everybody"


def test_there_is_no_address_anywhere():
    text = "\n".join(path.read_text("utf-8") for path in FOLDER.glob("*.yaml"))
    addresses = set(re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text)) - {"127.0.0.1", "0.0.0.0"}
    assert not addresses
    assert not re.search(r"\b[0-9a-f]{1,4}:[0-9a-f:]*::|\bfd[0-9a-f]{2}:", text)


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_command_is_one_and_takes_its_options(name):
    container = CONTAINERS[name]
    ports = {str(port["containerPort"]) for port in container.get("ports", ())}
    for line in commands(container):
        if line[:3] == ["tensorway", "vllm", "router"]:
            parser = argparse.ArgumentParser()
            router.add_arguments(parser)
            given = {key: value for key, value in vars(parser.parse_args(line[3:])).items() if value is not None}
            assert {str(options_of(given).port)} == ports
        elif line[0] == "tensorway":
            given = cli._parser().parse_args(line[1:])
            if line == words(container) and line[1] == "rendezvous":
                assert {str(given.port), str(given.metrics_port)} == ports
        else:
            assert line[:2] == ["vllm", "serve"] and line[line.index("--port") + 1] in ports


def told(name):
    """What an engine is told, as Tensorway reads it."""
    line = words(CONTAINERS[name])
    config = json.loads(line[line.index("--kv-transfer-config") + 1])
    return config, fitted(HandoverOptions, config["kv_connector_extra_config"], "", "")


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name.endswith(": engine")])
def test_an_engine_is_told_where_to_meet_and_how_to_move(name):
    config, options = told(name)
    assert config["kv_connector"] == "TensorwayConnector" and config["kv_load_failure_policy"] == "recompute"
    assert config["kv_role"] == {"prefill": "kv_producer", "decode": "kv_consumer"}[name.split(": ")[0].split()[-1]]
    service, _, port = options.rendezvous_options["address"].partition(":")
    assert int(port) in [each["port"] for each in SERVICES[service]["ports"] if each["name"] == "rendezvous"]
    handover = fitted(Handover, options.options, "", "")
    assert handover.transport == "nixl"
    assert fitted(NixlOptions, handover.transport_options, "", "").host == "runtime"


def test_the_router_asks_every_replica_of_every_engine_and_ends_before_its_grace_does():
    parser = argparse.ArgumentParser()
    router.add_arguments(parser)
    workload = WORKLOADS["router Deployment tensorway-router"]
    given = parser.parse_args(words(pod(workload)["containers"][0])[3:])
    for role in ("prefill", "decode"):
        engine = WORKLOADS[f"engines StatefulSet {role}"]["spec"]
        (port,) = (each["port"] for each in SERVICES[engine["serviceName"]]["ports"])
        assert getattr(given, role) == [
            f"http://{role}-{number}.{engine['serviceName']}:{port}" for number in range(engine["replicas"])
        ]
    assert given.drain_seconds < pod(workload)["terminationGracePeriodSeconds"]


# -- what the manifests run, run here


def run(line, **environ):
    line = [sys.executable, "-m", *line]
    return subprocess.run(line, capture_output=True, text=True, timeout=100, env={**os.environ, **environ})


@pytest.fixture
def rendezvous(tmp_path):
    """The container of the rendezvous: what its manifest runs, at ports that are free; and those of its probes."""
    workload = WORKLOADS["rendezvous Deployment tensorway-rendezvous"]
    (container,) = pod(workload)["containers"]
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n", "utf-8")
    ports = {str(each["containerPort"]): str(free_port()) for each in container["ports"]}

    def adapted(line):
        return [re.sub("|".join(ports), lambda found: ports[found[0]], word) for word in line]

    # The cluster would say the pod's address, and mount the secret.
    environ = {"POD_IP": "127.0.0.1", "TENSORWAY_SECRET_FILE": str(secret)}
    process = subprocess.Popen(
        [sys.executable, "-m", *adapted(words(container))], env={**os.environ, **environ}, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline().startswith(b"Holding records at 127.0.0.1:")
        ready = adapted(container["readinessProbe"]["exec"]["command"])
        live = next(
            ports[str(each["containerPort"])]
            for each in container["ports"]
            if each["name"] == container["livenessProbe"]["tcpSocket"]["port"]
        )
        yield process, lambda **more: run(ready, **{**environ, **more}).returncode, int(live)
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


def listens(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_the_probes_of_the_rendezvous_say_whether_it_answers(rendezvous, tmp_path):
    process, ready, live = rendezvous
    assert ready() == 0
    assert listens(live)
    stranger = tmp_path / "another"
    stranger.write_text("another secret that is long enough", "utf-8")
    assert ready(TENSORWAY_SECRET_FILE=str(stranger)) == 2
    process.send_signal(signal.SIGSTOP)
    assert ready() == 3, "it is there, and answers nobody"
    process.send_signal(signal.SIGCONT)
    began, grace = (
        time.monotonic(),
        pod(WORKLOADS["rendezvous Deployment tensorway-rendezvous"])["terminationGracePeriodSeconds"],
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 0
    assert time.monotonic() - began < grace
    assert ready() == 3
    assert not listens(live)


def test_a_pod_where_the_fabric_cannot_be_used_does_not_become_ready():
    line = words(CONTAINERS["engines StatefulSet decode: doctor"])
    usable = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13"))
    found = run(line)
    assert found.returncode == (0 if usable else 3), found.stdout
    assert "usable" in found.stdout
    assert run([word.replace("nixl", "local") for word in line]).returncode == 0
    assert run([word.replace("nixl", "rixl") for word in line]).returncode == 3
