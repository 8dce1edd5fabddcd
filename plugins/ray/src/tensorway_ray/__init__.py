"""Tensorway on Ray. Importing this imports no Ray; what each name does is told where it is defined."""

from __future__ import annotations

from tensorway_ray.direct_transport import register
from tensorway_ray.keeper import end

__all__ = ["end", "register"]
