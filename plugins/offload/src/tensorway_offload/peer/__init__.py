"""The tier `peer`: engines of one deployment read each other's primary memory. See `tier`."""

from __future__ import annotations
