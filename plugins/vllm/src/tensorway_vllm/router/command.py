"""`tensorway vllm router`, on the command line. May import the core's command line, and aiohttp when it is run."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tensorway.errors import BackendUnavailable
from tensorway_vllm.router.options import RouterOptions, options_of, read

if TYPE_CHECKING:
    from tensorway.cli.output import Output

SUMMARY = "Route requests to engines that prefill and engines that decode."
_ABOUT = """
A client asks the router as it would ask vLLM. The prompt goes to a prefill engine, its ticket and the request to a
decode engine, and the answer back to the client. Where no ticket can be had, the decode engine computes the prompt.
"""
_HELP = {
    "prefill": ("URL", "an engine that prefills; may be given several times, or not at all"),
    "decode": ("URL", "an engine that answers; at least one, may be given several times"),
    "host": ("HOST", "where to listen"),
    "port": ("PORT", "0 takes one that is free, and prints it"),
    "choice": ("HOW", "which engine is asked next: least-loaded or round-robin"),
    "hand_over_bytes": ("N", "requests of fewer bytes are not handed over"),
    "connect_seconds": ("S", "deadline of a connection to an engine"),
    "prefill_seconds": ("S", "deadline of a prefill; then the decode engine computes the prompt"),
    "first_seconds": ("S", "deadline of the first word of a stream; then another decode engine is asked"),
    "silence_seconds": ("S", "deadline of each next word of a stream"),
    "request_seconds": ("S", "deadline of a whole request"),
    "client_seconds": ("S", "deadline of a client's body"),
    "attempts": ("N", "how many times a request is offered to decode engines"),
    "health_seconds": ("S", "between two questions for an engine's health"),
    "health_deadline": ("S", "deadline of such a question"),
    "health_failures": ("N", "failures in a row that make an engine be left alone"),
    "health_backoff": ("S", "longest time for which it is, before it is asked again"),
    "most": ("N", "requests at once; more are refused with 503"),
    "body_bytes": ("N", "length of a request; longer ones are refused with 413"),
    "held_bytes": ("N", "of an answer that is no stream, held back until it is whole"),
    "drain_seconds": ("S", "for which requests go on after SIGTERM"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option; their values are checked together with those of the file."""
    parser.description = " ".join(_ABOUT.split())
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON with these options, with _ for -")
    for field in attrs.fields(RouterOptions):
        metavar, text = _HELP[field.name]
        flag = f"--{field.name.replace('_', '-')}"
        how: dict[str, Any] = {"action": "append"}
        if field.name not in ("prefill", "decode"):
            default = f"{field.default:g}" if isinstance(field.default, float) else field.default
            how, text = {"type": type(field.default)}, f"{text} (default: {default})"
        parser.add_argument(flag, dest=field.name, metavar=metavar, default=None, help=text, **how)


def run(given: argparse.Namespace, out: Output) -> int:
    """Serve until SIGTERM or SIGINT. What is on the command line counts more than what is in the file."""
    named = {field.name for field in attrs.fields(RouterOptions)}
    values = {name: value for name, value in vars(given).items() if name in named and value is not None}
    options = options_of({**(read(given.config) if given.config else {}), **values})
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        asked, true = "tensorway vllm router was asked for.", f"aiohttp cannot be imported: {error}."
        raise BackendUnavailable(asked, true, 'pip install "tensorway-vllm[router]"') from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return asyncio.run(_serve(options, out))


async def _serve(options: RouterOptions, out: Output) -> int:
    from tensorway_vllm.router.app import Router

    told, again = asyncio.Event(), asyncio.Event()

    def end() -> None:
        (again if told.is_set() else told).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    router = Router(options)
    out.line(f"Listening at {await router.start()}.")
    try:
        await told.wait()
        out.line("Taking no more requests.")
        draining, hurried = asyncio.ensure_future(router.drain()), asyncio.ensure_future(again.wait())
        await asyncio.wait({draining, hurried}, return_when=asyncio.FIRST_COMPLETED)
        left = draining.result() if draining.done() else None
        for task in (draining, hurried):
            task.cancel()
        if left != 0:
            out.line(f"{'Some' if left is None else left} requests were cut off.")
        return 0
    finally:
        await router.close()
