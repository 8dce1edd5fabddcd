"""THE contract between the core and its plugins, on one page.

A plugin names one factory per backend in its metadata, in the entry-point group `tensorway.<hook>`, and says in the
group `tensorway.api` which `API` it was written for. The host calls the factory once, when somebody first needs the
backend, with a `HookContext`; the factory returns an `Offer` and loads nothing native while doing so.

Ground: imports `types` and pluggy. Nobody calls these functions: pluggy reads their signatures.
"""

from __future__ import annotations

from typing import Final

import pluggy

from tensorway.types import KINDS, HookContext, Offer

#: The plugin API of this core. It grows by one when a plugin that was right yesterday would be wrong today.
API: Final = 1
#: The oldest plugin API that this core still serves.
OLDEST_API: Final = 1

PROJECT: Final = "tensorway"
#: Entry-point groups are `GROUP_PREFIX + hook`; `API_GROUP` declares the API.
GROUP_PREFIX: Final = "tensorway."
API_GROUP: Final = "tensorway.api"
#: `GROUP_PREFIX + COMMAND` is the group of commands for the command line. They are no hook: `tensorway.cli.commands`
#: runs them.
COMMAND: Final = "command"
#: The same for what a movement's dist adds to `tensorway demo`: `tensorway.cli.demonstration` has its words.
DEMO: Final = "demo"
#: The same for the words after `tensorway offload`, which the dist `tensorway-offload` runs.
OFFLOAD_COMMAND: Final = "offload_command"
#: The same for what a dist measures of itself, which `tensorway bench` of the dist `tensorway-tools` runs.
BENCH: Final = "bench"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def platform(ctx: HookContext) -> Offer:  # type: ignore[empty-body]
    """Which accelerators are here. Constructs a `PlatformReport`; creates no context on any device."""


@hookspec
def transport(ctx: HookContext) -> Offer:  # type: ignore[empty-body]
    """The narrow waist: moves blocks of registered memory between peers over one fabric."""


@hookspec
def eplb_communicator(ctx: HookContext) -> Offer:  # type: ignore[empty-body]
    """Moves expert weights between the ranks of a group, for a fabric that can do better than a transport."""


@hookspec
def placement_policy(ctx: HookContext) -> Offer:  # type: ignore[empty-body]
    """Decides which rank holds which expert, from loads and the placement that is there."""


@hookspec
def kv_connector(ctx: HookContext) -> Offer:  # type: ignore[empty-body]
    """Hands over the KV blocks of a request from one engine to another."""


@hookspec
def offloading(ctx: HookContext) -> Offer:  # type: ignore[empty-body]
    """Keeps KV blocks outside the device: manager, load-store spec and worker of one primary tier."""


@hookspec
def offload_tier(ctx: HookContext) -> Offer:  # type: ignore[empty-body]
    """A further tier below the primary one: files, an object store, another host."""


@hookspec
def eviction_policy(ctx: HookContext) -> Offer:  # type: ignore[empty-body]
    """Orders the keys of a tier by how soon they may go."""


@hookspec
def rendezvous(ctx: HookContext) -> Offer:  # type: ignore[empty-body]
    """How endpoints find each other: records with leases and watches."""


@hookspec
def observer(ctx: HookContext) -> Offer:  # type: ignore[empty-body]
    """Is told what happened (transfers, losses, evictions).

    Bound once, at construction, never called through pluggy.
    """


#: Name -> specification; the host, the docs test and `new-plugin` all walk this.
HOOKS: Final = {name: globals()[name] for name in KINDS}
