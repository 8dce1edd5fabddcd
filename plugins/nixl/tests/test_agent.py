"""The host process stays as it was; each test in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tensorway_nixl import agent
from tensorway_nixl.options import NixlOptions

CREATE = """
import ctypes, json, os, signal, sys
import tensorway
def create(**options):
    return tensorway.create("transport", "nixl", options)
"""


def test_sighup_does_what_it_did(fresh_python, real_nixl):
    code = (
        CREATE
        + """
seen = []
signal.signal(signal.SIGHUP, lambda *_: seen.append("ours"))
endpoint = create()
os.kill(os.getpid(), signal.SIGHUP)
endpoint.close()
print(json.dumps(seen))
"""
    )
    assert ["ours"] == fresh_python(code)
    # Whoever sets it wants UCX's debug mode.
    assert [] == fresh_python(code, UCX_DEBUG_SIGNO="SIGHUP")


def test_sighup_does_what_it_did_even_if_ucx_was_not_told_in_time(fresh_python, real_nixl):
    code = (
        CREATE
        + """
import os
from tensorway_nixl import agent
os.environ.pop("UCX_DEBUG_SIGNO", None)
agent.settings.get = lambda name, default=None: "0" if name == "UCX_DEBUG_SIGNO" else os.environ.get(name, default)
from tensorway_nixl.library import LIBRARY
from tensorway_nixl.options import NixlOptions
one = agent.create("nixl", LIBRARY.result(), "someone", NixlOptions())
caught = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("SigCgt"))
print(json.dumps(int(caught, 16) & 1))
"""
    )
    assert 0 == fresh_python(code)


def test_nothing_is_printed_and_nothing_is_logged_by_nixl(fresh_python, real_nixl, tmp_path):
    code = (
        CREATE
        + """
import logging
from tensorway.errors import PeerLost
log, handler = logging.getLogger("app"), logging.FileHandler(sys.argv[1], mode="w")
log.addHandler(handler)
log.warning("before")
stdout = os.dup(1)
with open(sys.argv[2], "wb") as file:
    os.dup2(file.fileno(), 1)
    endpoint = create()
    endpoint.register(bytearray(4096))
    dead = tensorway.create("transport", "nixl")
    description = dead.describe()
    dead.close()
    try:
        endpoint.connect(description)  # of which UCX tells that the connection was refused
    except PeerLost:
        pass
    endpoint.close()
    sys.stdout.flush()
    os.dup2(stdout, 1)
log.warning("after")
print(json.dumps([open(sys.argv[1]).read().split(), open(sys.argv[2]).read(), logging.getLogger().handlers]))
"""
    )
    files = [str(tmp_path / name) for name in ("app.log", "stdout")]

    assert [["before", "after"], "", []] == fresh_python(code, *files)


def test_several_names_in_an_option_reach_ucx_and_stay_out_of_the_environment(fresh_python, real_nixl):
    code = (
        CREATE
        + """
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
before = dict(os.environ)
# With the first alone, UCX refuses: "no active messages transport".
endpoint = create(ucx_tls=["cma", "tcp"], network_devices=["lo", "eth0"])
endpoint.close()
left = [name for name in set(os.environ) ^ set(before) if name.startswith("UCX_")]
print(json.dumps([sorted(left), libc.getenv(b"UCX_TLS"), libc.getenv(b"UCX_NET_DEVICES")]))
"""
    )
    ours = ["UCX_DEBUG_SIGNO", "UCX_LOG_FILE", "UCX_RCACHE_MAX_UNRELEASED", "UCX_USE_MT_MUTEX"]
    assert [ours, None, None] == fresh_python(code)


#: Makes an endpoint, and prints on which addresses this process and those that it started then listen.
LISTENS = (
    CREATE
    + """
import logging
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("tensorway").addHandler(handler)
import socket
endpoint = create(**json.loads(sys.argv[1]))
from pathlib import Path
processes = ["self"]
for process in processes:
    for task in Path("/proc", process, "task").iterdir():
        try:
            processes += (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread that has ended meanwhile
inodes = set()
for process in processes:
    for fd in Path("/proc", process, "fd").iterdir():
        try:
            link = os.readlink(fd)
        except FileNotFoundError:
            continue
        if link.startswith("socket:["):
            inodes.add(link[8:-1])
listens = set()
for line in open("/proc/self/net/tcp"):
    row = line.split()
    if row[3] == "0A" and row[9] in inodes:
        listens.add(socket.inet_ntoa(bytes.fromhex(row[1].split(":")[0])[::-1]))
print(json.dumps([sorted(listens), said]))
endpoint.close()
"""
)


@pytest.mark.parametrize("options", [{"host": "loopback"}, {"host": "loopback", "ucx_tls": ["tcp"]}])
@pytest.mark.parametrize("set_by_the_user", ["", "lo"])
def test_a_host_policy_decides_where_ucx_listens(fresh_python, real_nixl, options, set_by_the_user):
    listens, said = fresh_python(LISTENS, json.dumps(options), UCX_NET_DEVICES=set_by_the_user)
    assert (["127.0.0.1"], []) == (listens, said)


def test_a_mover_listens_where_the_host_policy_says(fresh_python, real_nixl):
    assert [["127.0.0.1"], []] == fresh_python(LISTENS, json.dumps({"host": "loopback", "contained": True}))


@pytest.mark.parametrize("options", [{}, {"contained": True}])
def test_without_an_option_the_policy_of_the_deployment_decides(fresh_python, real_nixl, options):
    assert [["127.0.0.1"], []] == fresh_python(LISTENS, json.dumps(options), TENSORWAY_HOST="loopback")


@pytest.mark.parametrize("options", [{}, {"contained": True}])
def test_devices_that_are_named_win_over_the_policy_of_the_deployment(fresh_python, real_nixl, options):
    named = json.dumps({"network_devices": ["lo"], **options})
    assert [["127.0.0.1"], []] == fresh_python(LISTENS, named, TENSORWAY_HOST="iface:none0")


def test_the_users_devices_win_over_the_host_policy_which_is_said(fresh_python, real_nixl):
    listens, said = fresh_python(LISTENS, json.dumps({"host": "loopback"}), UCX_NET_DEVICES="all")
    assert [
        "UCX_NET_DEVICES=all is set, and wins over the host policy loopback, which gives lo; unset it, or choose by "
        "one of them"
    ] == said
    assert "127.0.0.1" in listens


def test_a_host_policy_that_gives_nothing_here_is_refused(fresh_python, real_nixl):
    code = (
        CREATE
        + """
from tensorway.errors import AddressInvalid
refused = []
for contained in (False, True):
    try:
        create(host="iface:none0", contained=contained)
    except AddressInvalid as error:
        refused.append(error.true)
print(json.dumps(refused))
"""
    )
    one, two = fresh_python(code)
    assert one.startswith("It fits no address.") and one == two


@pytest.mark.parametrize(("seconds", "gives_up", "asks"), [(15, "15000ms", "3s"), (2.5, "2500ms", "1s")])
def test_the_time_out_of_a_peer_is_what_ucx_is_told(seconds, gives_up, asks):
    said = agent._variables(NixlOptions(peer_timeout=seconds))
    assert (gives_up, asks, asks) == tuple(
        said[f"UCX_TCP_{name}"] for name in ("USER_TIMEOUT", "KEEPIDLE", "KEEPINTVL")
    )


def test_the_users_own_ucx_variables_win_over_the_options(fresh_python, real_nixl):
    code = (
        CREATE
        + """
from tensorway.errors import BackendUnavailable
from tensorway_nixl import agent, library
from tensorway_nixl.options import NixlOptions
try:
    agent.create("nixl", library.LIBRARY.result(), "someone", NixlOptions(ucx_tls=("tcp",)))
    print(json.dumps("created"))
except BackendUnavailable as error:
    print(json.dumps(str(error)))
"""
    )
    assert "created" == fresh_python(code)
    text = fresh_python(code, UCX_TLS="cma,self")
    assert "cannot create an agent with a UCX backend (nixlBackendError: NIXL_ERR_BACKEND)" in text


def test_listening_can_be_kept_to_one_interface(fresh_python, real_nixl):
    code = (
        CREATE
        + """
def listening():
    fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    inodes = {os.readlink(fd)[8:-1] for fd in fds if os.path.lexists(fd)}
    rows = [line.split() for line in open("/proc/self/net/tcp").read().splitlines()[1:]]
    return sorted({row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes})
endpoint = create(network_devices=["lo"])
print(json.dumps(listening()))
endpoint.close()
"""
    )
    assert ["0100007F"] == fresh_python(code)


def test_a_forked_child_that_ends_normally_leaves_the_parents_agent_alone(real_nixl):
    code = (
        CREATE
        + """
endpoint = create()
endpoint.register(memory := bytearray(4096))
if (child := os.fork()) == 0:
    endpoint.close()
    del endpoint
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
endpoint.describe()
endpoint.close()
print("parent ended well")
"""
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)

    assert (0, "parent ended well\n") == (done.returncode, done.stdout), done.stderr


@pytest.mark.parametrize("missing", ["nixl_cu12", "nixl_cu13"])
def test_without_nixl_an_endpoint_says_what_to_install(fresh_python, hide, missing):
    code = (
        CREATE
        + """
from tensorway.errors import BackendUnavailable
from tensorway_nixl.fabric import NixlFabric
try:
    NixlFabric().open("x", "y")
except BackendUnavailable as error:
    print(json.dumps(str(error)))
"""
    )
    text = fresh_python(code, path=(hide("nixl_cu12", "nixl_cu13"),))

    assert 'pip install "tensorway[nixl]"' in text
    assert f"{missing} is not installed" in text
