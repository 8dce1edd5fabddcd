"""What this dist offers, as its metadata says. May import tensorway's ground and its own package; no redis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.types import HookContext, Offer
from tensorway_redis.options import RedisOptions
from tensorway_redis.probe import probe

if TYPE_CHECKING:
    from tensorway.rendezvous.rendezvous import Rendezvous


def rendezvous(ctx: HookContext) -> Offer:
    """The rendezvous `redis`: for deployments that have a Redis already."""
    return Offer(
        name="redis",
        kind="rendezvous",
        summary="Records in Redis, changed by scripts in the server; with leases and watches.",
        probe=probe,
        factory=construct,
        options=RedisOptions,
        # Not `durable`: whether Redis keeps what it was told is its operator's configuration.
        capabilities={"lease", "watch", "compare"},
        # Below `direct`, which needs nobody, and below etcd, which survives the loss of a host.
        priority=30,
    )


def construct(options: RedisOptions, context: object) -> Rendezvous:
    """Enter; connects with the first call."""
    from tensorway.rendezvous.offer import secret_of
    from tensorway.rendezvous.rendezvous import Rendezvous
    from tensorway_redis.store import RedisStore

    secret = secret_of(options.secret)
    return Rendezvous(RedisStore(options), secret)
