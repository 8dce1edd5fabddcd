"""What a user may set on the rendezvous `ray`. Imports attrs only."""

from __future__ import annotations

import attrs


@attrs.frozen
class RayOptions:
    """Options of the rendezvous `ray`."""

    #: The name of the actor that keeps the records; who looks for another sees other records.
    name: str = attrs.field(default="tensorway", validator=attrs.validators.matches_re(r"[A-Za-z0-9_.-]{1,64}"))
    #: Ray's namespace for that name. Not the job's own, which has a random name unless somebody chose one.
    namespace: str = attrs.field(default="tensorway", validator=attrs.validators.matches_re(r"[A-Za-z0-9_.-]{1,64}"))
    #: Where the actor listens on its node: a policy, not an address.
    host: str = "runtime"
    #: Whether the actor outlives the process that made it, until `tensorway_ray.end` ends it.
    detached: bool = False
    #: The cluster for a process that is not in one yet, as `ray.init` takes it; empty never enters one.
    cluster: str = ""
    #: Seconds that finding the actor, or starting it, may take.
    deadline: float = attrs.field(default=60.0, validator=[attrs.validators.gt(0), attrs.validators.le(3600)])
