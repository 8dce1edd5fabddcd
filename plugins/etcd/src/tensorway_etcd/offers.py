"""What this dist offers, as its metadata says. May import tensorway's ground and its own package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.types import HookContext, Offer
from tensorway_etcd.options import EtcdOptions
from tensorway_etcd.probe import probe

if TYPE_CHECKING:
    from tensorway.rendezvous.rendezvous import Rendezvous


def rendezvous(ctx: HookContext) -> Offer:
    """The rendezvous `etcd`: for deployments that must outlive any one of their processes."""
    return Offer(
        name="etcd",
        kind="rendezvous",
        summary="Records in an etcd cluster, over its HTTP gateway; durable, with leases and watches.",
        probe=probe,
        factory=construct,
        options=EtcdOptions,
        capabilities={"lease", "watch", "compare", "durable"},
        # Below `direct`, which needs nobody: whoever runs an etcd says where.
        priority=40,
    )


def construct(options: EtcdOptions, context: object) -> Rendezvous:
    """Enter; connects with the first call."""
    from tensorway.rendezvous.offer import secret_of
    from tensorway.rendezvous.rendezvous import Rendezvous
    from tensorway_etcd.store import EtcdStore

    secret = secret_of(options.secret)
    return Rendezvous(EtcdStore(options), secret)
