from __future__ import annotations

import pytest

from tensorway.errors import OptionsInvalid
from tensorway.hookspecs import API
from tensorway.plugins.options import validated
from tensorway.types import HookContext
from tensorway_etcd.offers import rendezvous
from tensorway_etcd.options import EtcdOptions

OFFER = rendezvous(HookContext(api=API, core_version="0"))


def test_lists_of_a_config_file_become_tuples():
    given = {"endpoints": ["https://a:2379", "https://[::1]:2379"], "ca_file": "ca.pem"}

    assert EtcdOptions(("https://a:2379", "https://[::1]:2379"), ca_file="ca.pem") == validated(OFFER, given)


def test_the_secret_is_not_in_reports():
    assert "hidden words" not in repr(EtcdOptions(secret="hidden words"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"endpoints": []}, "one URL at least"),
        ({"endpoints": "http://a:2379"}, "array"),
        ({"endpoints": ["a:2379"]}, "endpoint 0 is not like"),
        ({"endpoints": ["http://a:2379", "http://a"]}, "endpoint 1 is not like"),
        ({"endpoints": ["http://a:2379/v3"]}, "endpoint 0 is not like"),
        ({"endpoints": ["http://a:x"]}, "endpoint 0 is not like"),
        ({"endpoints": ["http://u:hidden@a:2379"]}, "endpoint 0 is not like"),
        ({"max_request_bytes": 1}, "max_request_bytes"),
        ({"endpoint": ["http://a:2379"]}, "'endpoints'"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(given, says):
    with pytest.raises(OptionsInvalid) as refused:
        validated(OFFER, given)

    assert says in str(refused.value)
