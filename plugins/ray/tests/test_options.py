from __future__ import annotations

import pytest

from tensorway.errors import OptionsInvalid
from tensorway.hookspecs import API
from tensorway.plugins.options import validated
from tensorway.types import HookContext
from tensorway_ray.offers import rendezvous
from tensorway_ray.options import RayOptions

OFFER = rendezvous(HookContext(api=API, core_version="0"))


def test_no_option_has_to_be_given():
    assert RayOptions() == validated(OFFER, {})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": ""}, "name"),
        ({"namespace": "a b"}, "namespace"),
        ({"deadline": 0}, "deadline"),
        ({"deadline": float("inf")}, "deadline"),
        ({"names": "x"}, "'name'"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(given, says):
    with pytest.raises(OptionsInvalid) as refused:
        validated(OFFER, given)

    assert says in str(refused.value)
