from __future__ import annotations

import pytest

from tensorway.errors import OptionsInvalid
from tensorway.hookspecs import API
from tensorway.plugins.options import validated
from tensorway.types import HookContext
from tensorway_nccl.offers import eplb_communicator
from tensorway_nccl.options import NcclOptions

OFFER = eplb_communicator(HookContext(api=API, core_version="0"))


def test_what_a_config_file_says_becomes_options():
    given = {"lane": "torch", "interface": "eth0", "max_ctas": 4, "timeout_s": 5}
    assert NcclOptions("torch", "eth0", 4, 5.0) == validated(OFFER, given)
    assert NcclOptions("auto", None, None, 30.0) == validated(OFFER, {})


def test_where_to_agree_is_a_host_policy():
    assert "iface:eth0" == validated(OFFER, {"interface": "eth0"}).policy
    assert "cidr:10.0.0.0/8" == validated(OFFER, {"host": "cidr:10.0.0.0/8"}).policy


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lane": "fast"}, "lane"),
        ({"interface": "a/b"}, "interface"),
        ({"interface": "eth0", "host": "auto"}, "give one of them"),
        ({"max_ctas": 0}, "max_ctas"),
        ({"max_ctas": 65}, "max_ctas"),
        ({"max_ctas": 1.5}, "max_ctas"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"max_cta": 4}, "'max_ctas'"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(given, says):
    with pytest.raises(OptionsInvalid) as refused:
        validated(OFFER, given)

    assert says in str(refused.value)
