"""The actor that keeps a cluster's records: `direct`'s service, on the head's node where that is to be had.

May import tensorway's ground, `rendezvous` and its own package; imports Ray when an actor is looked for. Whoever looks
for the actor starts it if it is not there; Ray's name makes sure that there is one. A member learns address and secret
from the actor, so who may enter the cluster may enter the rendezvous, and who merely reaches its port may not.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from tensorway.errors import BackendUnavailable, DeadlineExceeded, TensorwayError
from tensorway_ray.actors import enter
from tensorway_ray.cluster import library
from tensorway_ray.options import RayOptions

if TYPE_CHECKING:
    from tensorway.rendezvous.service import Service

#: A resource that Ray gives the head's node, and no other.
_HEAD: Final = "node:__internal_head__"
#: Between two looks for an actor whose name Ray has not given free yet.
_PAUSE: Final = 0.1
#: How long an actor that was ended is given until its name is free.
_GONE: Final = 10.0
#: How long an actor that was found is given to say where it listens before Ray is asked about it again.
_ANSWERS: Final = 5.0
#: An actor that is not detached ends with the last handle of who made it: it is to live as long as the process does.
_kept: Final[dict[Any, Any]] = {}


class Keeper:
    """What runs in the actor."""

    def __init__(self, host: str) -> None:
        from tensorway.rendezvous.hosts import choose
        from tensorway.rendezvous.service import Service

        enter()
        self._service: Service | None = None
        self._secret = secrets.token_urlsafe(32)
        #: Kept instead of raised: an actor whose constructor raises dies without three lines.
        self._refused: tuple[str, str, str] | None = None
        try:
            self._service = Service(choose(host), 0, self._secret)
        except TensorwayError as error:
            self._refused = (error.asked, error.true, error.to_do)

    def entrance(self) -> Entrance:
        """Where members enter, and with what."""
        return Entrance(self._service.address if self._service else "", self._secret, self._refused)


@attrs.frozen
class Entrance:
    """How a service is entered, or why there is none."""

    address: str
    secret: str = attrs.field(repr=False)
    refused: tuple[str, str, str] | None = None


def find(options: RayOptions, seconds: float) -> tuple[Any, Entrance]:
    """The actor and how it is entered; starts it unless it is there. Raises `DeadlineExceeded`."""
    ray = library("The rendezvous ray was to be entered.", options.cluster)
    until, why = time.monotonic() + seconds, "Ray was not asked in time"
    while (left := until - time.monotonic()) > 0:
        actor = _started(ray, options)
        try:
            return actor, _checked(ray, actor, ray.get(actor.entrance.remote(), timeout=min(left, _ANSWERS)))
        except ray.exceptions.GetTimeoutError:
            why = "the actor is there, and does not answer"
        except (ray.exceptions.RayActorError, ValueError) as error:
            _kept.pop(actor, None)
            why = " ".join(str(error).split())[:200]  # it has just died; its name is free in a moment
        time.sleep(max(0.0, min(_PAUSE, until - time.monotonic())))
    raise DeadlineExceeded(
        f"The actor {options.name} in Ray's namespace {options.namespace} was looked for (within {seconds:g} s).",
        f"It did not say where it listens: {why.rstrip('.')}.",
        "See whether the cluster has room for one more process: ray status",
    )


def alive(actor: Any, seconds: float) -> bool:
    """Whether Ray says that the actor lives; one that does not answer in time may."""
    import ray

    try:
        ray.get(actor.entrance.remote(), timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        return True
    except ray.exceptions.RayActorError:
        return False
    return True


def end(name: str = "tensorway", namespace: str = "tensorway") -> bool:
    """End the actor, and all records with it; whether there was one. What is detached ends only by this."""
    ray = library("A rendezvous of Ray was to be ended.")
    try:
        actor = ray.get_actor(name, namespace)
    except ValueError:
        return False
    _kept.pop(actor, None)
    ray.kill(actor)
    until = time.monotonic() + _GONE
    with contextlib.suppress(ValueError):  # it has no such name any more
        while time.monotonic() < until and ray.get_actor(name, namespace) == actor:
            time.sleep(_PAUSE)
    return True


def _started(ray: Any, options: RayOptions) -> Any:
    # No processor of its own: it mostly waits, and must not wait for room that engines have taken.
    actor = (
        ray.remote(Keeper)
        .options(
            name=options.name,
            namespace=options.namespace,
            get_if_exists=True,
            lifetime="detached" if options.detached else None,
            num_cpus=0,
            resources=_at_the_head(ray),
        )
        .remote(options.host)
    )
    _kept.setdefault(actor, actor)
    return actor


def _at_the_head(ray: Any) -> dict[str, float]:
    """A share of what only the head's node has: a cluster is over with its head, and another node is missed late."""
    # Not an affinity: Ray places what needs nothing on any node, whatever the affinity says.
    return {_HEAD: 0.001} if any(_HEAD in node["Resources"] for node in ray.nodes()) else {}


def _checked(ray: Any, actor: Any, entrance: Any) -> Entrance:
    if not isinstance(entrance, Entrance):
        true = f"The actor answers {type(entrance).__name__}, and is no rendezvous of this version."
        to_do = "Install one version of tensorway-ray in the whole cluster, or choose another name."
        raise BackendUnavailable("The rendezvous ray was to be entered.", true, to_do)
    if entrance.refused is not None:
        ray.kill(actor)  # or its name would stay taken by what serves nobody
        asked, true, to_do = entrance.refused
        raise BackendUnavailable(asked, f"Its actor could not listen. {true}", to_do)
    return entrance
