"""What this dist offers, as its metadata says. May import tensorway's ground and its own package; no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.types import HookContext, Offer
from tensorway_tcpstore.options import TcpStoreOptions
from tensorway_tcpstore.probe import probe

if TYPE_CHECKING:
    from tensorway.rendezvous.rendezvous import Rendezvous


def rendezvous(ctx: HookContext) -> Offer:
    """The rendezvous `tcpstore`: for jobs that have the store of torchrun, and no other."""
    return Offer(
        name="tcpstore",
        kind="rendezvous",
        summary="Records in torch.distributed's TCPStore; no leases, no watches, gone with its process.",
        probe=probe,
        factory=construct,
        options=TcpStoreOptions,
        capabilities={"compare"},
        # It cannot tell who died: only by name, or if nothing else can be used.
        priority=5,
    )


def construct(options: TcpStoreOptions, context: object) -> Rendezvous:
    """Enter the store at the address, or run one here and enter that."""
    from tensorway.rendezvous.offer import secret_of
    from tensorway.rendezvous.rendezvous import Rendezvous
    from tensorway_tcpstore.store import TcpStore

    secret = secret_of(options.secret)
    return Rendezvous(TcpStore(options), secret)
