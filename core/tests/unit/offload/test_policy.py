"""What a policy hears."""

from __future__ import annotations

import inspect

from tensorway.offload import EvictionPolicy, PolicyContext


def test_a_policy_hears_of_keys_in_lists_and_yields_them():
    heard = {name: value for name, value in vars(EvictionPolicy).items() if callable(value) and name[0] != "_"}
    assert {"used", "wanted", "stored", "ended", "removed", "victims", "evicted", "reset"} <= set(heard)
    for name in ("used", "wanted", "stored", "ended"):
        assert ["self", "keys", "req"] == list(inspect.signature(heard[name]).parameters)
    for name in ("removed", "evicted"):
        assert ["self", "keys"] == list(inspect.signature(heard[name]).parameters)


def test_its_clock_is_whose_it_is():
    context = PolicyContext(3, lambda: 7.0)
    assert (3, 7.0) == (context.capacity, context.clock())
