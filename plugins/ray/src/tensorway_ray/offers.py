"""What this dist offers, as its metadata says. May import tensorway's ground and its own package; no ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.types import HookContext, Offer
from tensorway_ray.options import RayOptions
from tensorway_ray.probe import probe

if TYPE_CHECKING:
    from tensorway.rendezvous.rendezvous import Rendezvous


def rendezvous(ctx: HookContext) -> Offer:
    """The rendezvous `ray`: for the actors and drivers of a Ray cluster."""
    return Offer(
        name="ray",
        kind="rendezvous",
        summary="The service of direct in a named Ray actor: found by its name, and started again when it is gone.",
        probe=probe,
        factory=construct,
        options=RayOptions,
        capabilities={"lease", "watch", "compare"},
        # Below all that need no cluster: `auto` must not depend on whether Ray happens to be installed.
        priority=20,
    )


def construct(options: RayOptions, context: object) -> Rendezvous:
    """Enter: find the actor, or start it."""
    from tensorway.rendezvous.rendezvous import Rendezvous
    from tensorway_ray.store import RayStore

    return Rendezvous(RayStore(options))
