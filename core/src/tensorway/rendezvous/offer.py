"""What the core offers of kind `rendezvous`: `direct`.

Room `rendezvous`; may import the ground and its own room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from tensorway import settings
from tensorway.errors import Unauthenticated
from tensorway.types import HookContext, Offer, ProbeResult

#: Shorter ones can be guessed, from a sealed record also by who cannot ask.
MIN_SECRET: Final = 16

if TYPE_CHECKING:
    from tensorway.rendezvous.rendezvous import Rendezvous


@attrs.frozen
class DirectOptions:
    """Options of the rendezvous `direct`."""

    #: `host:port` of the service. Empty: this process runs it.
    address: str = ""
    #: Where a service of this process listens: a policy, not an address. Empty: TENSORWAY_HOST, else loopback.
    host: str = ""
    #: What others are told instead, where addresses are translated: an address or a name, never a wildcard.
    advertise: str = ""
    #: Its port; 0 lets the system choose a free one.
    port: int = 0
    #: What all members know; empty takes it from TENSORWAY_SECRET, or the file that TENSORWAY_SECRET_FILE names.
    secret: str = attrs.field(default="", repr=False)


def rendezvous(ctx: HookContext) -> Offer:
    """The embedded default: one process of the deployment holds the records in memory."""
    return Offer(
        name="direct",
        kind="rendezvous",
        summary="One process holds the records; the others reach it over an encrypted connection.",
        probe=probe,
        factory=construct,
        options=DirectOptions,
        capabilities={"lease", "watch", "compare"},
        priority=50,
    )


def construct(options: DirectOptions, context: object) -> Rendezvous:
    """Enter the service at the address, or run one here and enter that."""
    from tensorway.rendezvous.direct import DirectStore
    from tensorway.rendezvous.hosts import choose, policy_of
    from tensorway.rendezvous.rendezvous import Rendezvous
    from tensorway.rendezvous.service import Service

    secret = secret_of(options.secret)
    if options.address:
        store = DirectStore(options.address, secret)
    else:
        choice = choose(policy_of(options.host, "loopback"), advertise=options.advertise)
        service = Service(choice, options.port, secret)
        store = DirectStore(service.address, secret, service)
    return Rendezvous(store)


def secret_of(given: str) -> str:
    """The secret that was given, or the deployment's; raises `Unauthenticated` without one."""
    secret = given or settings.secret()
    true = "" if secret else "No secret was given, and whoever reaches a rendezvous reaches the memory of its members."
    if 0 < len(secret) < MIN_SECRET:
        true = f"The secret has {len(secret)} characters; fewer than {MIN_SECRET} can be guessed."
    if true:
        raise Unauthenticated(
            "A rendezvous was to be entered.",
            true,
            "Set TENSORWAY_SECRET to the same long random text in every process of the deployment.",
        )
    return secret


def password_in(file: str, whose: str) -> str:
    """The password that a file holds, for the store of somebody else; raises `Unauthenticated` if it cannot be read."""
    try:
        return settings.text_in(file)
    except OSError as error:
        raise Unauthenticated(
            f"The password for {whose} was to be read.",
            f"It cannot be: {error}.",
            "Name a text file that this process may read in password_file.",
        ) from error


def probe() -> ProbeResult:
    """Whether the ZeroMQ that is installed can encrypt."""
    try:
        import zmq
    except ImportError as error:
        return ProbeResult.failed(f"ZeroMQ cannot be loaded: {error}", "pip install pyzmq")
    if not zmq.has("curve"):
        return ProbeResult.failed(
            f"ZeroMQ {zmq.zmq_version()} was built without CURVE, and cannot encrypt", "pip install pyzmq"
        )
    return ProbeResult.passed(f"ZeroMQ {zmq.zmq_version()} with CURVE", zeromq=zmq.zmq_version())
