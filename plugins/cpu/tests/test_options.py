from __future__ import annotations

import pytest

from tensorway.errors import OptionsInvalid
from tensorway.hookspecs import API
from tensorway.plugins.options import validated
from tensorway.types import HookContext
from tensorway_cpu.offers import offloading
from tensorway_cpu.options import CPUOptions

OFFER = offloading(HookContext(api=API, core_version="0"))


def test_what_a_config_file_says_becomes_options():
    given = {"capacity_bytes": 1 << 30, "pin": False, "huge_pages": False}

    assert CPUOptions(1 << 30, False, False) == validated(OFFER, given)
    assert CPUOptions(None, None, True) == validated(OFFER, {})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"capacity_bytes": 0}, "capacity_bytes"),
        ({"capacity_bytes": "4 GiB"}, "capacity_bytes"),
        ({"pin": 1}, "pin"),
        ({"capacity": 4096}, "'capacity_bytes'"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(given, says):
    with pytest.raises(OptionsInvalid) as refused:
        validated(OFFER, given)

    assert says in str(refused.value)
