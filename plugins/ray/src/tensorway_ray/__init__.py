"""Tensorway on Ray. Importing this imports no Ray; what each name does is told where it is defined."""

from __future__ import annotations

from tensorway_ray.actors import enter, runtime_env
from tensorway_ray.direct_transport import register
from tensorway_ray.keeper import end
from tensorway_ray.placement import Placement, one_per_node

__all__ = ["Placement", "end", "enter", "one_per_node", "register", "runtime_env"]
