"""Which address of this host to listen on, and which to tell others: chosen where the socket is bound.

Room `rendezvous`; may import the ground and its own room. What travels between hosts is a policy, which is right on
every one of them; an address is right on one. So every address is checked to be this host's own, nothing is guessed by
asking a public server, and an ambiguity is an error that lists the choices.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NoReturn

import attrs

from tensorway import settings
from tensorway.errors import AddressInvalid
from tensorway.rendezvous.interfaces import Address, local_addresses

#: The policies, for people.
POLICIES: Final = "auto, loopback, runtime, addr:IP, iface:NAME, cidr:NET, peer:HOST, any:POLICY"

#: What knows this host's address or name: a runtime that started this process on it. None or blank: it does not.
Provider = Callable[[], str | None]

#: So many addresses are listed; a node of Kubernetes can have hundreds.
_LISTED: Final = 16
_LABEL: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


@attrs.frozen
class HostChoice:
    """An address to bind, and the one to advertise; they differ behind a wildcard, and where addresses are translated.

    `fabrics` has what the choice means to libraries, as a mapping of their variables.
    """

    bind: str
    advertise: str
    #: What decided: `cidr:10.0.0.0/8`, `route to 10.0.0.7`.
    source: str
    #: The interface that has it, if one does.
    interface: str = ""
    #: This host's own address that was chosen, whatever is bound and advertised.
    address: str = attrs.field(default=attrs.Factory(lambda self: self.advertise, takes_self=True))


# -- runtimes


def _kubernetes() -> str | None:
    """The pod's address, where its manifest asks the downward API for it under the usual name."""
    return settings.get("POD_IP")


def _slurm() -> str | None:
    """The name by which Slurm knows this node; set by its daemon on every node, and for each step anew."""
    return settings.get("SLURMD_NODENAME")


_providers: Final[dict[str, Provider]] = {}
_BUILT_IN: Final[Mapping[str, Provider]] = {"kubernetes": _kubernetes, "slurm": _slurm}


def provide(name: str, provider: Provider) -> None:
    """Let a runtime say this host's address (or its name) to the policies `runtime` and `auto`.

    The last that was registered is asked first, and Kubernetes and Slurm after all others. A name that is registered
    again is replaced. What it says is checked like every address: it must be this host's own.
    """
    _providers.pop(name, None)
    _providers[name] = provider


def providers() -> dict[str, Provider]:
    """Who is asked, in order."""
    return {**dict(reversed(_providers.items())), **{k: v for k, v in _BUILT_IN.items() if k not in _providers}}


# -- choosing


def url(host: str, port: int | str) -> str:
    """`host:port`, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def cannot_listen(what: str, choice: HostChoice, port: int, why: str | None) -> AddressInvalid:
    """The error for a socket that cannot be bound where it was to be; `why` is what the system says."""
    return AddressInvalid(
        f"{what} was to listen on {url(choice.bind, port)} (from {choice.source}).",
        f"It cannot: {why}.",
        "Use port 0, and the system chooses a free one; or see who has this one: ss -ltnp.",
    )


def policy_of(option: str, otherwise: str = "") -> str:
    """The policy that an option says; for a blank one that of the deployment, `TENSORWAY_HOST`, else `otherwise`."""
    return option.strip() or (settings.get("TENSORWAY_HOST") or "").strip() or otherwise


def meeting(rendezvous: str, policy: str = "") -> HostChoice:
    """The choice of one of a group that meets at this address of a rendezvous (`host:port`): all have a route there."""
    host, _, _ = rendezvous.rpartition("://")[2].partition("/")[0].rpartition(":")
    return choose(policy_of(policy, "auto"), peers=[host.strip("[]")] if host else [])


def pinned(policy: str) -> str:
    """A policy that gives the same in a process of this host that knows no runtime; blank stays blank."""
    return f"addr:{choose(policy).address}" if policy.strip() else ""


def choose(
    policy: str = "auto",
    *,
    advertise: str = "",
    peers: Iterable[str] = (),
    runtime: Mapping[str, Provider] | None = None,
    addresses: Iterable[Address] | None = None,
) -> HostChoice:
    """Resolve a policy on this host; raises `AddressInvalid` when it has no answer, or more than one.

    `auto`, which a blank policy means, asks the runtimes (those of `providers`, unless others are given), then the
    route to a real peer, then takes the only address there is. Others are told `advertise` instead where that is given:
    an address or a name that leads here by somebody who translates addresses.
    """
    known = tuple(local_addresses() if addresses is None else addresses)
    asked = providers() if runtime is None else runtime
    choice = _choose(policy.strip() or "auto", tuple(peers), asked, known)
    if not advertise.strip():
        return choice
    return attrs.evolve(choice, advertise=_tellable(advertise.strip()), address=choice.address)


def _choose(
    policy: str, peers: tuple[str, ...], runtime: Mapping[str, Provider], known: tuple[Address, ...]
) -> HostChoice:
    kind, _, argument = policy.partition(":")
    if kind == "any" and argument:
        choice = _choose(argument, peers, runtime, known)
        return attrs.evolve(choice, bind="::" if ":" in choice.advertise else "0.0.0.0", source=f"any, {choice.source}")
    if kind == "addr" and argument:
        return _own(argument, policy, policy, known)
    if kind in ("iface", "cidr") and argument:
        return _only(policy, known, _matching(kind, argument, policy, known))
    if kind == "peer" and argument:
        return _towards(policy, (argument,), known) or _fail(policy, f"This host has no route to {argument}.", known)
    if policy == "loopback":
        first = [address for address in known if address.ip.is_loopback and str(address.ip) in ("127.0.0.1", "::1")]
        return _only(policy, known, first)
    if policy == "runtime":
        true = f"No runtime knows this host's address (asked: {', '.join(runtime) or 'none'})."
        return _from_runtime(policy, runtime, known) or _fail(policy, true, known)
    if policy == "auto":
        return (
            _from_runtime(policy, runtime, known)
            or _towards(policy, peers, known)
            or _only(policy, known, [address for address in known if not address.ip.is_loopback])
        )
    raise AddressInvalid(
        f"The host policy {policy[:80]!r} was given.", "There is none of that kind.", f"Choose one of: {POLICIES}."
    )


def _matching(kind: str, argument: str, policy: str, known: tuple[Address, ...]) -> list[Address]:
    if kind == "iface":
        return [address for address in known if address.interface == argument]
    try:
        network = ipaddress.ip_network(argument, strict=False)
    except ValueError as error:
        _fail(policy, f"{str(error)[:1].upper()}{str(error)[1:]}.", known)
    return [address for address in known if address.ip in network]


def _from_runtime(policy: str, runtime: Mapping[str, Provider], known: tuple[Address, ...]) -> HostChoice | None:
    """What the first runtime that knows this host says; it may say a name."""
    for name, provider in runtime.items():
        said, source = str(provider() or "").strip(), f"runtime {name}"
        if not said:
            continue
        if _address(said) or not _is_name(said):
            return _own(said, policy, source, known)
        # A host's own name often stands for loopback, in its own file of hosts; to others that says nothing.
        meant = [ip for ip in _looked_up(said) if not ip.is_loopback]
        if found := [address for address in known if address.ip in meant]:
            return attrs.evolve(_only(policy, known, found), source=source)
        if meant:
            listed = ", ".join(map(str, meant))
            _fail(policy, f"{said} (from {source}) stands for {listed}, which is not this host.", known)
    return None


def _looked_up(name: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        rows = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []  # nobody has told the resolver of it
    return sorted({ip for row in rows if (ip := _address(str(row[4][0])))}, key=str)


def _towards(policy: str, peers: Iterable[str], known: tuple[Address, ...]) -> HostChoice | None:
    """The address that the kernel would use towards the first peer that it has a route to; sends nothing."""
    for peer in peers:
        try:
            family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)
                return _own(probe.getsockname()[0], policy, f"route to {peer}", known)
        except OSError:
            continue  # no name, or no route: the next peer
    return None


def _own(text: str, policy: str, source: str, known: tuple[Address, ...]) -> HostChoice:
    ip = _address(text)
    if ip is None:
        _fail(policy, f"{text[:80]!r} (from {source}) is no IP address.", known)
    for address in known:
        # All of 127.0.0.0/8 is this host's own, and one address of it is listed.
        if address.ip == ip or (address.ip.is_loopback and ip.is_loopback and address.ip.version == ip.version):
            return HostChoice(str(ip), str(ip), source, address.interface)
    true = f"{ip} (from {source}) is not an address of this host; it was probably copied from another's environment."
    _fail(policy, true, known)


def _only(policy: str, known: tuple[Address, ...], found: list[Address]) -> HostChoice:
    # One interface often has both families; IPv4 is then what everything else on the host listens on.
    chosen = [address for address in found if address.ip.version == 4] or found
    if len(chosen) == 1:
        return HostChoice(str(chosen[0].ip), str(chosen[0].ip), policy, chosen[0].interface)
    true = f"It fits {len(chosen)} addresses: {_listed(chosen)}." if chosen else "It fits no address."
    _fail(policy, true, known)


def _fail(policy: str, true: str, known: tuple[Address, ...]) -> NoReturn:
    raise AddressInvalid(
        f"An address of {socket.gethostname()} was to be chosen by {policy[:80]!r}.",
        f"{true} This host has: {_listed(known)}.",
        "Say which by iface:NAME or cidr:NET, which are right on every host; never send an address to another.",
    )


def _listed(addresses: Sequence[Address]) -> str:
    more = f", and {len(addresses) - _LISTED} more" if len(addresses) > _LISTED else ""
    return (", ".join(map(str, addresses[:_LISTED])) or "none") + more


# -- what was written by somebody


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None


def _is_name(text: str) -> bool:
    labels = text.removesuffix(".").split(".")
    return len(text) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit()


def _tellable(text: str) -> str:
    """An address or a name that others can be told; raises `AddressInvalid` for what leads nowhere from elsewhere."""
    ip = _address(text)
    if ip is None and _is_name(text):
        return text
    true = "It is neither an address nor a name of a host (and a port has an option of its own)."
    if ip is not None:
        plain = getattr(ip, "ipv4_mapped", None) or ip
        if not (plain.is_unspecified or plain.is_multicast or plain.is_link_local or str(plain) == "255.255.255.255"):
            return str(ip)
        true = "It is no address of one host: a wildcard, a multicast, or valid on one link only."
    raise AddressInvalid(
        f"{text[:80]!r} was to be advertised.", true, "Give the address or the name by which others reach this host."
    )
