"""The command line, `tensorway`: arguments in, exit code out. The room for people, above all others.

Room `cli`; may import every room. A command never shows a traceback unless it is asked to with `--debug`: every
failure has three lines and an exit code.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import tensorway
from tensorway.cli import exits
from tensorway.cli.arguments import seconds
from tensorway.cli.output import Output
from tensorway.errors import TensorwayError
from tensorway.types import KINDS

if TYPE_CHECKING:
    from tensorway.plugins.scan import Declaration

#: The core's own commands; a plugin's command of one of these names is never reached.
COMMANDS: Final = ("doctor", "plugins", "why", "new-plugin", "check", "probe", "rendezvous", "environment")
#: What a command waits for at most.
_DAY: Final = seconds(86_400)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words and not words[0].startswith("-") else ""
    if name in COMMANDS:  # who asks for one of ours does not pay for looking for others
        arguments = _parser().parse_args(words)
        return _guarded(lambda out: _run(arguments, out), arguments)
    from tensorway.cli import commands

    rest, flags = commands.split(words[1:])
    return _guarded(lambda out: _run_other(name, rest, words, out), flags)


def _run_other(name: str, rest: list[str], words: list[str], out: Output) -> int:
    """A plugin's command; or help, the version, or what is wrong with the words."""
    from tensorway.cli import commands

    found = commands.listed()
    if name not in (*commands.EXTRAS, *(row.name for row in found)):
        parser = _parser(found)
        parser.parse_args(words)
        parser.error("the command comes first")
    return commands.run(name, rest, out)


def _guarded(run: Callable[[Output], int], flags: argparse.Namespace) -> int:
    """Run it; whatever it raises becomes three lines and an exit code."""
    out = Output(as_json=flags.json, debug=flags.debug)
    # What the host warns of, it also reports; on a terminal that would be said twice.
    logging.getLogger("tensorway").addHandler(logging.StreamHandler() if out.debug else logging.NullHandler())
    try:
        return run(out)
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except BrokenPipeError as error:
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)
        if not pipe.poll(0):
            return _explain(error, out)  # it was another pipe
        # The reader went away (`| head`); Python would complain about it once more while it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.OK
    except Exception as error:
        if out.debug:
            raise
        return _explain(error, out)


def _run(arguments: argparse.Namespace, out: Output) -> int:
    """Each command imports only what it needs: `--help` must not pay for `doctor`."""
    match arguments.command:
        case "doctor":
            from tensorway.cli import doctor

            return doctor.run(out, arguments.backend, arguments.probe_timeout)
        case "plugins":
            from tensorway.cli import plugins

            if arguments.action == "show":
                return plugins.show(out, arguments.name, arguments.kind)
            return plugins.list_all(out, arguments.kind)
        case "why":
            from tensorway.cli import why

            return why.run(out, arguments.kind, arguments.name, arguments.device, arguments.needs)
        case "new-plugin":
            from tensorway.cli import new_plugin

            return new_plugin.command(out, arguments.name, arguments.kind, arguments.dir)
        case "check":
            from tensorway.cli import check

            asked = (arguments.name, arguments.hook, arguments.output, arguments.badge, arguments.deadline)
            return check.run(out, check.Asked(*asked, arguments.options))
        case "probe":
            return _probe(arguments, out)
        case "rendezvous":
            return _rendezvous(arguments, out)
        case _:
            from tensorway.cli import environment

            return environment.run(out, arguments.host)


def _probe(arguments: argparse.Namespace, out: Output) -> int:
    """By itself, one end, or the other."""
    if arguments.serve:
        from tensorway.cli import probe_peer

        return probe_peer.serve(out, arguments.transport, arguments.host, arguments.port, arguments.seconds)
    if arguments.peer:
        from tensorway.cli import probe_peer

        return probe_peer.run(out, arguments.peer, arguments.transport, arguments.host, arguments.deadline)
    from tensorway.cli import probe

    return probe.run(out, arguments.transport)


def _rendezvous(arguments: argparse.Namespace, out: Output) -> int:
    """Be one, or look at one."""
    from tensorway.cli import rendezvous

    file = arguments.secret_file
    if arguments.status:
        return rendezvous.status(out, arguments.status, arguments.prefix, file, arguments.deadline)
    from tensorway.rendezvous.hosts import choose, policy_of

    choice = choose(policy_of(arguments.host, "loopback"), advertise=arguments.advertise)
    return rendezvous.serve(out, choice, arguments.port, file, arguments.metrics_port, arguments.seconds)


def _explain(error: Exception, out: Output) -> int:
    """Three lines on stderr, or one JSON object on stdout."""
    code = exits.code_for(error)
    if not isinstance(error, TensorwayError):
        error = TensorwayError(
            f"tensorway stopped: {type(error).__name__}: {error}",
            "This is a defect of tensorway, or of Python's environment.",
            "Run the command again with --debug, and report what it prints.",
        )
    name = type(error).__name__
    out.json(
        "tensorway.error/1",
        {"error": name, "asked": error.asked, "true": error.true, "to_do": error.to_do, "exit_code": code},
    )
    if not out.as_json:
        out.notes.write(f"{name}: {error}\n")
    return code


def _parser(others: Iterable[Declaration] = ()) -> argparse.ArgumentParser:
    """The parser of our commands, which also lists those of plugins."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object of a documented schema")
    common.add_argument("--debug", action="store_true", help="show tracebacks, logs and what probes printed")
    parser = argparse.ArgumentParser(
        prog="tensorway",
        description="Moves the state of LLM inference over whichever fabric the machine has.",
        epilog="Exit codes. " + " ".join(f"{code}: {text}" for code, text in exits.MEANING.items()),
    )
    parser.add_argument("--version", action="version", version=f"tensorway {tensorway.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    doctor = command("doctor", "Say what is installed, what works here, and what to do about the rest.")
    doctor.add_argument("--backend", metavar="NAME", help="examine only this one: name, name@dist or kind:name")
    doctor.add_argument("--probe-timeout", type=_DAY, metavar="SECONDS", help="how long one probe may take")
    text = "List the installed backends, or show one."
    _add_plugins(commands.add_parser("plugins", help=text, description=text), common)
    why = command("why", "Say which backend would be chosen, and why not the others.")
    why.add_argument("kind", metavar="KIND", help=f"one of: {', '.join(KINDS)}")
    why.add_argument("name", metavar="NAME", nargs="?", default="auto", help="name, name@dist, or auto (default)")
    why.add_argument("--device", default="", help="memory that it must address: cpu, cuda, rocm, xpu")
    why.add_argument("--needs", action="append", default=[], metavar="CAPABILITY", help="may be given several times")
    new = command("new-plugin", "Write a plugin dist that installs, is discovered and passes its own tests.")
    new.add_argument("name", metavar="NAME", help="the backend's name: letters, digits, '-' and '_'")
    new.add_argument("--kind", required=True, metavar="KIND", help=f"one of: {', '.join(KINDS)}")
    new.add_argument("--dir", type=Path, default=Path(), help="folder to write it into (default: here)")
    check = command("check", "Run the conformance kit against an installed backend, and write what came of it.")
    check.add_argument("name", metavar="NAME", help="name or name@dist")
    check.add_argument("--hook", metavar="KIND", help="of this kind, where several have one of that name")
    check.add_argument("--output", type=Path, default=Path("conformance.json"), metavar="FILE", help="the report")
    check.add_argument("--badge", type=Path, action="append", default=[], metavar="FILE", help="a badge: .svg, .json")
    check.add_argument("--deadline", type=_DAY, default=120.0, metavar="SECONDS", help="how long one test may take")
    check.add_argument("--options", type=_mapping, default={}, metavar="JSON", help="what the backend is made with")
    _add_probe(command("probe", "Measure what a transport really does: with a peer, or here with a second process."))
    _add_rendezvous(command("rendezvous", "Run the service of the rendezvous direct; or say who is in one that runs."))
    environment = command("environment", "Say which variables travel from here to workers, and which do not.")
    environment.add_argument("--host", default="", metavar="POLICY", help="and which address it gives: auto, cidr:NET")
    for row in others:
        if row.name not in COMMANDS:
            commands.add_parser(row.name, help=f"From {row.dist} {row.version}.", add_help=False)
    return parser


def _add_probe(probe: argparse.ArgumentParser) -> None:
    probe.add_argument("peer", metavar="PEER", nargs="?", default="", help="host:port of a machine that serves")
    probe.add_argument("--transport", metavar="NAME", help="only this one: name or name@dist")
    probe.add_argument("--deadline", type=_DAY, default=60.0, metavar="SECONDS", help="how long to wait for PEER")
    probe.add_argument("--serve", action="store_true", help="be the PEER of others; needs TENSORWAY_SECRET, as they do")
    probe.add_argument("--host", default="", metavar="POLICY", help="by which address: auto, iface:NAME, cidr:NET")
    probe.add_argument("--port", type=int, default=0, help="where to listen (default: a free one)")
    probe.add_argument("--seconds", type=_DAY, default=600.0, metavar="SECONDS", help="how long to serve")


def _add_rendezvous(rendezvous: argparse.ArgumentParser) -> None:
    rendezvous.add_argument("--host", default="", metavar="POLICY", help="where to listen (default: loopback)")
    rendezvous.add_argument(
        "--advertise", default="", metavar="HOST", help="what others are told, where it is translated"
    )
    rendezvous.add_argument("--port", type=int, default=0, help="where to listen (default: a free one)")
    rendezvous.add_argument("--secret-file", default="", metavar="FILE", help="instead of TENSORWAY_SECRET")
    rendezvous.add_argument("--metrics-port", type=int, metavar="PORT", help="serve GET /metrics there; 0: any")
    rendezvous.add_argument("--seconds", type=_DAY, metavar="SECONDS", help="how long to serve (default: for ever)")
    rendezvous.add_argument("--status", metavar="ADDRESS", help="ask the one at host:port how it is, and who is there")
    rendezvous.add_argument("--prefix", default="/", metavar="KEY", help="show only what is below this (default: all)")
    rendezvous.add_argument("--deadline", type=_DAY, default=5.0, metavar="SECONDS", help="how long to ask")


def _add_plugins(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|show")
    listing = actions.add_parser("list", help="every backend, from metadata alone", parents=[common])
    listing.add_argument("--kind", help="only this kind")
    show = actions.add_parser("show", help="everything about one backend", parents=[common])
    show.add_argument("name", metavar="NAME", help="name or name@dist")
    show.add_argument("--kind", help="only this kind")


def _mapping(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # it may be too deep
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError('a JSON object, such as {"folder": "{folder}"}')
    return found
