"""Loads as whole numbers of grains, so that every rank decides alike. May import numpy and `placement`.

A sum of floats depends on the order of its terms, and that on the processor and on numpy's build. Grains are whole
numbers whose sums stay below 2**53, so they are exact in any order; everything else that a policy computes is rounded
once, by IEEE's rules.
"""

from __future__ import annotations

import numpy as np

from tensorway_eplb.placement import Loads

#: Bits of the largest sum; a float64 holds 53.
_BITS = 52


def grains(loads: Loads, slots: int) -> Loads:
    """Each layer scaled by a power of two and rounded; sums over `slots` of a layer are exact."""
    _, exponent = np.frexp(loads.max(axis=1, initial=0.0))
    spare = int(np.ceil(np.log2(max(slots, loads.shape[1], 2)))) + 1
    # Scaled in two steps: a load near the largest float would need a factor that no float can be.
    shift = (_BITS - spare - exponent)[:, None]
    scaled: Loads = np.rint(np.ldexp(np.ldexp(loads, shift // 2), shift - shift // 2))
    return scaled


def shares(load: Loads, counts: Loads) -> Loads:
    """What each replica of an expert has to do, in grains; 0 for an expert that nobody holds."""
    shared: Loads = np.rint(np.divide(load, counts, out=np.zeros_like(load), where=counts > 0))
    return shared
