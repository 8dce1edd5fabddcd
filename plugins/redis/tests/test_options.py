from __future__ import annotations

import pytest

from tensorway.errors import OptionsInvalid
from tensorway.hookspecs import API
from tensorway.plugins.options import validated
from tensorway.types import HookContext
from tensorway_redis.offers import rendezvous
from tensorway_redis.options import RedisOptions

OFFER = rendezvous(HookContext(api=API, core_version="0"))


def test_neither_the_secret_nor_the_password_is_in_reports():
    options = validated(OFFER, {"url": "rediss://user:hidden@host:6379/1", "secret": "hidden"})

    assert RedisOptions("rediss://user:hidden@host:6379/1", "hidden") == options
    assert "hidden" not in repr(options)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"url": "host:6379"}, "url is not like"),
        ({"url": "http://user:hidden@host:6379"}, "url is not like"),
        ({"namespace": ""}, "namespace"),
        ({"namespace": "a{b}"}, "namespace"),
        ({"urls": "redis://host"}, "'url'"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(given, says):
    with pytest.raises(OptionsInvalid) as refused:
        validated(OFFER, given)

    assert says in str(refused.value)
    assert "hidden" not in str(refused.value)
