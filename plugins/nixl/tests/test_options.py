from __future__ import annotations

import json

import attrs
import pytest

from tensorway.errors import OptionsInvalid
from tensorway.hookspecs import API
from tensorway.plugins.options import validated
from tensorway.types import HookContext
from tensorway_nixl.offers import transport
from tensorway_nixl.options import NixlOptions

OFFER = transport(HookContext(api=API, core_version="0"))


def test_lists_of_a_config_file_become_tuples():
    given = {"name": "engine-1", "network_devices": ["mlx5_0:1", "eth0"], "ucx_tls": ["cma", "tcp"]}

    assert NixlOptions("engine-1", ("mlx5_0:1", "eth0"), ("cma", "tcp")) == validated(OFFER, given)


def test_they_reach_a_mover_as_they_are():
    options = NixlOptions("engine-1", ("mlx5_0:1", "eth0"), ("cma", "tcp"), 5, 3, True)

    assert options == NixlOptions.from_plain(json.loads(json.dumps(attrs.asdict(options))))


def test_the_progress_thread_does_not_spin_unless_somebody_asks_for_it():
    assert 10_000 == validated(OFFER, {}).progress_interval_us
    assert 0 == validated(OFFER, {"progress_interval_us": 0}).progress_interval_us


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ucx_tls": ["cma", "self"]}, "add tcp"),
        ({"ucx_tls": ["cma,tcp"]}, "an item of its own"),
        ({"network_devices": ["lo,TLS=self"]}, "an item of its own"),
        ({"network_devices": [""]}, "an item of its own"),
        ({"network_devices": "eth0"}, "array"),
        ({"network_devices": ["lo"], "host": "auto"}, "give one of them"),
        ({"progress_interval_us": -1}, "progress_interval_us"),
        ({"progress_interval_us": 1.5}, "int"),
        ({"num_threads": 1000}, "num_threads"),
        ({"peer_timeout": 0.5}, "peer_timeout"),
        ({"network_device": ["eth0"]}, "'network_devices'"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(given, says):
    with pytest.raises(OptionsInvalid) as refused:
        validated(OFFER, given)

    assert says in str(refused.value)
