from __future__ import annotations

from tensorway.hookspecs import API
from tensorway.testing import OfferSuite
from tensorway.types import HookContext
from tensorway_redis.offers import rendezvous
from tensorway_redis.store import RedisStore


class TestOffer(OfferSuite):
    kind = "rendezvous"
    name = "redis"
    native_modules = ("redis",)


def test_the_offer_promises_what_the_store_can_do():
    offer = rendezvous(HookContext(api=API, core_version="0"))

    assert offer.factory is not None
    assert RedisStore.abilities == offer.capabilities
    assert "child" == offer.probe_in
