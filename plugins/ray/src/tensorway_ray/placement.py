"""One engine per node: places for actors on different nodes, in time or with the reason, and given back.

May import tensorway's ground and its own package. Ray's own placement waits for ever and does not say for what.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tensorway._logging import logger
from tensorway.errors import Closed, DeadlineExceeded, SettingInvalid
from tensorway_ray.cluster import library

_log = logger("ray")
#: How often actors that live are asked again; one that dies is told at once.
_LOOK: Final = 1.0
#: Nodes that an error lists.
_LISTED: Final = 16
#: What Ray's options call these; all others are `resources`.
_NAMED: Final = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}


class Placement:
    """Places on different nodes; a context manager. Threads may share it."""

    def __init__(self, ray: Any, group: Any, bundle: Mapping[str, float], addresses: Sequence[str]) -> None:
        self._ray = ray
        self._group = group
        self._bundle = dict(bundle)
        self._lock = threading.Lock()
        self._closed = False
        #: Of the nodes, by rank.
        self.addresses = tuple(addresses)

    def __len__(self) -> int:
        return len(self.addresses)

    def options(self, rank: int) -> dict[str, Any]:
        """What an actor class's `options` takes, to start the actor of this rank on its node with all that is there."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if self._closed or not 0 <= rank < len(self):
            true = "It was given back." if self._closed else f"It has places for ranks 0 to {len(self) - 1}."
            raise Closed(f"A place for rank {rank} was asked for.", true, "Ask for as many places as there are ranks.")
        named = {_NAMED[name]: amount for name, amount in self._bundle.items() if name in _NAMED}
        others = {name: amount for name, amount in self._bundle.items() if name not in _NAMED}
        strategy = PlacementGroupSchedulingStrategy(self._group, rank, placement_group_capture_child_tasks=False)
        return {"num_cpus": 0, **named, "resources": others, "scheduling_strategy": strategy}

    def follow(self, actors: Sequence[Any]) -> None:
        """Give the places back when the last of these actors is dead; nobody has to wait for it."""
        arguments = (list(actors),)
        threading.Thread(target=self._follow, args=arguments, name="tensorway-ray-placement", daemon=True).start()

    def close(self) -> None:
        """Give the places back; Ray ends the actors that are still there. The second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._ray.is_initialized():
            self._ray.util.remove_placement_group(self._group)

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _follow(self, actors: list[Any]) -> None:
        ray = self._ray
        # One question to each at a time: it is answered by an actor that lives, and fails with one that dies.
        asked = {actor.__ray_ready__.remote(): actor for actor in actors}
        while asked and not self._closed and ray.is_initialized():
            answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_LOOK)
            for question in answered:
                actor = asked.pop(question)
                try:
                    ray.get(question)
                except ray.exceptions.ActorUnavailableError:
                    pass  # Ray starts it again
                except ray.exceptions.RayActorError as error:
                    _log.warning("an engine of a placement is dead: %s", str(error).splitlines()[0])
                    continue
                asked[actor.__ray_ready__.remote()] = actor
            if answered:
                time.sleep(_LOOK)
        self.close()


def one_per_node(
    count: int, bundle: Mapping[str, float] | None = None, *, deadline: float = 60.0, name: str = ""
) -> Placement:
    """Places for `count` actors, each on a node of its own and each with what `bundle` says: one processor, if not.

    Raises `DeadlineExceeded`, which lists the nodes that there are and what each lacks.
    """
    wanted = dict(bundle or {"CPU": 1.0})
    asked = f"Places for {count} engines were asked for, one per node, each with {_said(wanted)}."
    if count < 1 or not all(amount > 0 for amount in wanted.values()):
        raise SettingInvalid(asked, "Counts and amounts are above zero.", "Ask for what an engine needs.")
    ray = library(asked)
    group = ray.util.placement_group([wanted] * count, strategy="STRICT_SPREAD", name=name)
    try:
        if not group.wait(deadline):
            raise DeadlineExceeded(
                f"{asked[:-1]}, within {deadline:g} s.",
                _lacking(ray, wanted, count),
                "Start nodes that have it, or end what holds it (ray status); or ask for less.",
            )
        placed = ray.util.placement_group_table(group)["bundles_to_node_id"]
    except BaseException:
        ray.util.remove_placement_group(group)
        raise
    addresses = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes()}
    return Placement(ray, group, wanted, [addresses.get(placed[rank], "") for rank in range(count)])


def _lacking(ray: Any, wanted: Mapping[str, float], count: int) -> str:
    """The nodes that there are, and what each has less of than was asked for."""
    from ray._private.state import available_resources_per_node  # Ray has no public way to ask for it

    free = available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    lines, fit = [], 0
    for node in alive:
        has, left = node["Resources"], free.get(node["NodeID"], {})
        short = [
            f"{left.get(each, 0):g} of {has.get(each, 0):g} {each} free"
            for each, amount in wanted.items()
            if left.get(each, 0) < amount
        ]
        fit += not short
        lines.append(f"{node['NodeManagerAddress']}: {', '.join(short) or 'has it'}")
    more = f"; and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    listed = "; ".join(lines[:_LISTED]) or "none"
    return f"{fit} of {len(alive)} nodes had that much free, and {count} are needed. Nodes are: {listed}{more}."


def _said(wanted: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
