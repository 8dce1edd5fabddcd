"""What goes to an actor's process, and the first thing that it does there.

May import tensorway's ground, `rendezvous` and its own package. Ray merges the variables of a job, of the parent actor
and of the actor, and can take none away; a driver's own reach every node by one of these ways. So what is right to
send is not enough: the actor drops what is not its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorway import settings
from tensorway._logging import logger
from tensorway.rendezvous import environment, fabrics, hosts
from tensorway_ray import nodes

_log = logger("ray")


def runtime_env(environ: Mapping[str, str] | None = None, **more: Any) -> dict[str, Any]:
    """What an actor, or a job, gets as its `runtime_env`: of this process's variables those that are true everywhere.

    `more` is the rest of a runtime environment; what its own `env_vars` say counts.
    """
    given = settings.environment() if environ is None else environ
    sent = environment.outgoing(given, nodes.identity())
    return {**more, "env_vars": {**sent, **more.get("env_vars", {})}}


def enter() -> environment.Report:
    """The first thing in an actor, before it loads a library that reads variables; says what was dropped, in one line.

    From then on the policies `runtime` and `auto` know the address by which Ray knows this node.
    """
    hosts.provide("ray", nodes.address)
    report = environment.sanitize(host=nodes.identity())
    # Engines read their own address from these: when another's is dropped, they are given this node's.
    mine, own = sorted(set(report.names("dropped")) & set(fabrics.ADDRESSES)), nodes.address()
    if mine and own is not None:
        for name in mine:
            settings.set_default(name, own)
        _log.warning("set to this node's address, %s: %s", own, ", ".join(mine))
    return report
