"""Questions for policies: loads as they are seen, and as nobody has seen them yet."""

from __future__ import annotations

import attrs
import numpy as np
from hypothesis import strategies as st

from tensorway_eplb.placement import EMPTY, Placement
from tensorway_eplb.policy import Topology


@attrs.frozen(eq=False)
class Question:
    loads: np.ndarray
    current: Placement
    topology: Topology


def zipf(layers, experts, seed, exponent=0.6):
    """A few hot experts and many cool ones, others in each layer."""
    rng = np.random.default_rng(seed)
    weights = 1e4 / np.arange(1, experts + 1) ** exponent
    return np.array([rng.permutation(weights) for _ in range(layers)])


@st.composite
def questions(draw, *, gaps=True):
    """Any shape that fits, any loads, any placement; with `gaps` also empty slots and lost experts."""
    layers, ranks, slots = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    experts = draw(st.integers(1, ranks * slots))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    rows = np.array([rng.permutation(np.arange(ranks * slots) % experts) for _ in range(layers)])
    if gaps:
        rows[rng.random(rows.shape) < draw(st.sampled_from([0, 0, 0.2, 0.9]))] = EMPTY
    scale = draw(st.sampled_from([1.0, 1e-300, 1e300, 7.0]))
    loads = np.where(rng.random((layers, experts)) < 0.2, 0.0, rng.pareto(1.5, (layers, experts)).clip(0, 1e6)) * scale
    if draw(st.booleans()):
        loads = np.rint(loads / scale) % 4  # ties
    nodes = tuple(int(node) for node in rng.integers(0, draw(st.integers(1, 3)), ranks))
    speeds = tuple(draw(st.sampled_from([(1.0,), (1.0, 0.5), (1.0, 3.0)])) * ranks)[:ranks]
    return Question(loads, Placement(rows, experts, ranks, draw(st.integers(0, 5))), Topology(nodes, speeds))


def receives(old, new):
    """Rows that ranks receive from others, by layer: each expert once for each rank; what is lost comes from a copy."""
    found = []
    for before, after in zip(old.by_rank.tolist(), new.by_rank.tolist(), strict=True):
        there = {expert for rank in before for expert in rank}
        pairs = zip(before, after, strict=True)
        found.append(sum(len((set(now) & there) - set(had) - {EMPTY}) for had, now in pairs))
    return found


def holds(placement):
    """Which experts anybody holds, by layer."""
    return [set(row) - {EMPTY} for row in placement.map.tolist()]
