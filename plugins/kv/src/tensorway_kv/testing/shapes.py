"""Engines that look like nothing in particular, in pairs that hold the same model. May import this dist."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import attrs

from tensorway_kv.layouts import Cache, Component, attention, latent

STATE: Final = (Component("conv", 6, 3), Component("ssm", 6, 5))


@attrs.frozen
class Mixed:
    """What an engine's ranks hold."""

    tp: int
    groups: tuple[Cache, ...]

    def caches(self) -> Sequence[Cache]:
        """Its cache groups."""
        return self.groups

    @property
    def page_tokens(self) -> tuple[int, ...]:
        """Of a block of each group; 0 for a state."""
        return tuple(group.page_tokens for group in self.groups)


def pair(rng: random.Random) -> tuple[Mixed, Mixed]:
    """Two engines of one model."""
    model = _model(rng)
    return _laid_out(rng, model), _laid_out(rng, model)


def _model(rng: random.Random) -> list[tuple[tuple[int, ...], tuple[Component, ...], int]]:
    """Layers, components, and the window of each group; -1 for a state."""
    if rng.random() < 0.25:
        attends = latent(rng.randint(5, 24))
    else:
        scale = rng.choice((0, 0, 4))
        attends = attention(rng.choice((1, 6, 6, 12)), rng.choice((2, 5, 8)), scale_bytes=scale)
    layers = rng.randint(1, 3)
    model = [(tuple(range(layers)), attends, rng.choice((0, 0, 0, 7)))]
    if rng.random() < 0.3:
        model.append((tuple(range(layers, layers + rng.randint(1, 2))), attends, rng.choice((0, 9))))
    if rng.random() < 0.25:
        model.append(((8,), STATE, -1))
    return model


def _laid_out(rng: random.Random, model: list[tuple[tuple[int, ...], tuple[Component, ...], int]]) -> Mixed:
    groups = []
    for layers, components, window in model:
        state = window < 0
        even = len({one.heads for one in components}) == 1
        groups.append(
            Cache(
                layers,
                components,
                0 if state else rng.choice((3, 4, 8)),
                max(window, 0),
                rng.choice(("NHD", "HND")),
                rng.choice(("component", "layer", "group")),
                even and not state and rng.random() < 0.3,
                rng.choice((0, 0, 16)),
            )
        )
    return Mixed(rng.randint(1, 3), tuple(groups))
