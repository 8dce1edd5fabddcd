"""What is wrong, or will hurt, in a configuration that vLLM would be given: read without starting an engine.

May import the core's plugin host, this package's options, and vllm where it is installed. What Tensorway reads is
checked as the engine would check it; of the rest only what vLLM's own class refuses, and what users should know.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs

import tensorway
from tensorway import settings
from tensorway.cli import exits
from tensorway.errors import TensorwayError
from tensorway.plugins import host
from tensorway.plugins.options import validated
from tensorway_vllm.eplb import options as eplb_options
from tensorway_vllm.plugin import CONNECTOR, HANDOVER, SPEC

_KV: Final = "--kv-transfer-config"
_ADDITIONAL: Final = "--additional-config"
#: vLLM's keys, for where it is not installed.
_KEYS: Final = (
    "kv_connector",
    "engine_id",
    "kv_buffer_device",
    "kv_role",
    "kv_port",
    "kv_connector_extra_config",
    "kv_connector_module_path",
    "enable_permute_local_kv",
    "kv_load_failure_policy",
)  # fmt: skip
_ROLES: Final = ("kv_producer", "kv_consumer", "kv_both")
_OURS: Final = dict((CONNECTOR, HANDOVER))
_MULTI: Final = "MultiConnector"
_PLAIN: Final = "OffloadingConnector"
#: Where the options of a connector are checked; imports nothing of vllm where that can be.
_OPTIONS: Final = {HANDOVER[0]: "tensorway_vllm.handover.options", CONNECTOR[0]: "tensorway_vllm.offloading.options"}
#: Options of ours that name a backend: its kind, and where its own options are.
_BACKENDS: Final = {
    HANDOVER[0]: (("rendezvous", "rendezvous", "rendezvous_options"), ("connector", "kv_connector", "options")),
    CONNECTOR[0]: (("backend", "offloading", "options"),),
}
#: How bad it is.
ERROR, WARNING, NOTE = "error", "warning", "note"


@attrs.frozen
class Remark:
    """One thing about a configuration."""

    level: str
    setting: str
    true: str
    to_do: str
    #: What an engine that starts with it would come to, as an exit code.
    code: int = exits.OK


def checked_transfer(text: str) -> list[Remark]:
    """Of the JSON for `--kv-transfer-config`."""
    given, wrong = _parsed(_KV, text)
    return wrong if given is None else [*_refused_by_vllm(given), *_connector(given, _KV), *_hashes(given)]


def checked_additional(text: str) -> list[Remark]:
    """Of the JSON for `--additional-config`."""
    given, wrong = _parsed(_ADDITIONAL, text)
    if given is None:
        return wrong
    return _tried(f"{_ADDITIONAL} {eplb_options.KEY}", lambda: _eplb(eplb_options.asked(given)))


def asks_for_eplb(text: str | None) -> bool:
    """Whether this JSON asks Tensorway for expert balancing, rightly or wrongly."""
    given, _ = _parsed(_ADDITIONAL, text or "{}")
    return given is not None and isinstance(given.get(eplb_options.KEY), Mapping)


def _parsed(flag: str, text: str) -> tuple[dict[str, Any] | None, list[Remark]]:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, [_usage(flag, f"It is not JSON: {error}.", "Quote it for the shell: '{...}'.")]
    if not isinstance(given, dict):
        return None, [_usage(flag, f"It is a {type(given).__name__}.", "Give a JSON object: '{...}'.")]
    return given, []


def _refused_by_vllm(given: Mapping[str, Any]) -> list[Remark]:
    """What vLLM's class says of it; without a vLLM, what we know of that class."""
    try:
        known: Any = importlib.import_module("vllm.config").KVTransferConfig
    except ImportError:
        return _refused_without_vllm(given)
    if unknown := _unknown(given, known.__dataclass_fields__):
        return unknown
    try:
        known(**given)
    except Exception as error:  # pydantic's, and vLLM's own
        return [_usage(_KV, f"vLLM refuses it: {_line(error)}", "Correct it; see vLLM's help of the flag.")]
    return []


def _refused_without_vllm(given: Mapping[str, Any]) -> list[Remark]:
    role, found = given.get("kv_role"), _unknown(given, _KEYS)
    if (given.get("kv_connector") is not None or role is not None) and role not in _ROLES:
        true = f"kv_role is {role!r}." if "kv_role" in given else "A connector needs a kv_role."
        found.append(_usage(_KV, true, f"Give one of: {', '.join(_ROLES)}."))
    return found


def _unknown(given: Mapping[str, Any], known: Iterable[str]) -> list[Remark]:
    names = sorted(known)
    return [_usage(_KV, f"vLLM has no key {key!r}.", _nearest(key, names)) for key in given if key not in names]


def _connector(given: Mapping[str, Any], where: str) -> list[Remark]:
    """One connector, or those that are in it."""
    name, extra = given.get("kv_connector"), given.get("kv_connector_extra_config", {})
    if not isinstance(name, str):
        return [Remark(NOTE, where, "No connector is named, so nothing is handed over or offloaded.", "")]
    if not isinstance(extra, dict):
        return []  # vLLM has said so
    if name == _MULTI:
        return _within(extra, where)
    if name == _PLAIN:
        return _plain(extra, where)
    if name not in _OURS:
        near = difflib.get_close_matches(name, _OURS, n=1, cutoff=0.8)
        if near and not given.get("kv_connector_module_path"):
            return [_usage(where, f"There is no connector {name!r}.", f"Did you mean {near[0]!r}?")]
        return [Remark(NOTE, where, f"{name} is not Tensorway's: its options were not looked at.", "")]
    return [*_options(name, extra, where), *_policy(given, name, where), *_path(given, name, where)]


def _within(extra: Mapping[str, Any], where: str) -> list[Remark]:
    inside = extra.get("connectors")
    if not isinstance(inside, list) or not all(isinstance(each, dict) for each in inside):
        return [_usage(where, f"{_MULTI} needs a list of configurations in 'connectors'.", "Give one for each.")]
    found = []
    for index, each in enumerate(inside):
        at = f"{where} connectors[{index}]"
        if "engine_id" in each:
            found.append(_usage(at, "A connector inside of another has no engine_id of its own.", "Leave it out."))
        found += _connector(each, at)
    return found


def _plain(extra: Mapping[str, Any], where: str) -> list[Remark]:
    """vLLM's own connector, which takes our spec by its name."""
    spec = extra.get("spec_name")
    if spec != SPEC[0]:
        near = difflib.get_close_matches(str(spec), [SPEC[0]], n=1, cutoff=0.8)
        if near and not extra.get("spec_module_path"):
            return [_usage(where, f"There is no spec {spec!r}.", f"Did you mean {SPEC[0]!r}?")]
        return [Remark(NOTE, where, f"{_PLAIN} without Tensorway's spec: its options were not looked at.", "")]
    true = f"With {_PLAIN} vLLM has no way to hear that a load has failed."
    return [
        *_options(CONNECTOR[0], extra, where),
        Remark(WARNING, f"{where} kv_connector", true, f"Use {CONNECTOR[0]}, which takes the same options."),
    ]


def _options(name: str, extra: Mapping[str, Any], where: str) -> list[Remark]:
    """Options of one of ours, and the backends that they name."""
    at = f"{where} kv_connector_extra_config"
    try:
        check: Any = importlib.import_module(_OPTIONS[name]).options_of
    except ImportError as error:
        return [
            Remark(NOTE, at, f"Options of {name} were not looked at: {error}.", "Install vLLM here, and ask again.")
        ]

    def look() -> list[Remark]:
        options = check(extra)
        for field, kind, own in _BACKENDS[name]:
            _backend(kind, getattr(options, field), getattr(options, own))
        return []

    return _tried(at, look)


def _policy(given: Mapping[str, Any], name: str, where: str) -> list[Remark]:
    if given.get("kv_load_failure_policy", "fail") == "recompute":
        return []
    at, true = (
        f"{where} kv_load_failure_policy",
        f"It is 'fail': a request whose blocks {name} cannot load ends in error.",
    )
    return [Remark(WARNING, at, true, "Set it to 'recompute'.")]


def _path(given: Mapping[str, Any], name: str, where: str) -> list[Remark]:
    path = given.get("kv_connector_module_path")
    if not path or path == _OURS[name]:
        return []
    at = f"{where} kv_connector_module_path"
    return [Remark(WARNING, at, f"{name} would be taken from {path!r}.", f"Leave it out, or give {_OURS[name]!r}.")]


def _hashes(given: Mapping[str, Any]) -> list[Remark]:
    """Whether blocks of one engine have the names that another one, or the same after a restart, looks for."""
    if settings.get("PYTHONHASHSEED") is not None or not any(name in json.dumps(given) for name in (*_OURS, SPEC[0])):
        return []
    true = "It is not set: names of blocks are the same in every engine only with a cryptographic hash (sha256)."
    to_do = "With --prefix-caching-hash-algo xxhash, set it to the same number for all engines."
    return [Remark(NOTE, "PYTHONHASHSEED", true, to_do)]


def _eplb(asked: eplb_options.EplbOptions | None) -> list[Remark]:
    if asked is None:
        return [Remark(NOTE, _ADDITIONAL, "Nothing is asked of Tensorway.", "")]
    # A measurement has options of several, by their names, and is made by all ranks.
    if asked.communicator and asked.communicator != "measured":
        _backend("eplb_communicator", asked.communicator, asked.options)
    if asked.policy:
        _backend("placement_policy", asked.policy, asked.policy_options)
    if asked.rendezvous:
        _backend("rendezvous", asked.rendezvous, asked.rendezvous_options)
    true = "What it asks of expert balancing is heard only where that is on."
    return [Remark(NOTE, f"{_ADDITIONAL} {eplb_options.KEY}", true, "Start vLLM with --enable-eplb.")]


def _backend(kind: str, name: str, given: Mapping[str, object]) -> None:
    """Raise what a construction would raise before it constructs."""
    plugins = host()
    decision = tensorway.decide(kind, name)
    if decision.winner is None:
        raise plugins.refusal(decision)
    if decision.winner.offer is not None:
        validated(decision.winner.offer, given)


def _tried(where: str, look: Callable[[], list[Remark]]) -> list[Remark]:
    try:
        return look()
    except TensorwayError as error:
        return [Remark(ERROR, where, f"{error.asked} {error.true}", error.to_do, exits.code_for(error))]


def _usage(where: str, true: str, to_do: str) -> Remark:
    return Remark(ERROR, where, true, to_do, exits.USAGE)


def _nearest(key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1)
    known = f"It knows: {', '.join(names)}."
    return f"Did you mean {near[0]!r}? {known}" if near else known


def _line(error: Exception) -> str:
    """What pydantic says in several lines, without the address of its docs."""
    lines = [line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
    return " ".join(line for line in lines if line)[:600]
