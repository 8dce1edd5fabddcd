from __future__ import annotations

import pytest

from tensorway.errors import OptionsInvalid
from tensorway.hookspecs import API
from tensorway.plugins.options import validated
from tensorway.types import HookContext
from tensorway_gloo.offers import eplb_communicator
from tensorway_gloo.options import GlooOptions

OFFER = eplb_communicator(HookContext(api=API, core_version="0"))


def test_what_a_config_file_says_becomes_options():
    assert GlooOptions("eth0", 5.0) == validated(OFFER, {"interface": "eth0", "timeout_s": 5})
    assert GlooOptions(None, 30.0) == validated(OFFER, {})


def test_where_to_listen_is_a_host_policy():
    assert "iface:eth0" == validated(OFFER, {"interface": "eth0"}).policy
    assert "cidr:10.0.0.0/8" == validated(OFFER, {"host": "cidr:10.0.0.0/8"}).policy


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"interface": "an interface"}, "interface"),
        ({"interface": "a" * 16}, "interface"),
        ({"interface": "../eth0"}, "interface"),
        ({"interface": "eth0", "host": "auto"}, "give one of them"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": "soon"}, "timeout_s"),
        ({"timeout": 5}, "'timeout_s'"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(given, says):
    with pytest.raises(OptionsInvalid) as refused:
        validated(OFFER, given)

    assert says in str(refused.value)
