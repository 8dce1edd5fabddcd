"""The values that core and plugins exchange: frozen, without behavior, without a tensor or an engine in them.

Ground: may import `errors`. What each hook asks and answers with these values is in `hookspecs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import attrs

#: A value of a fact or of an option that survives JSON.
Fact = str | int | float | bool | None

#: Where a probe runs: `child` for anything that may load native code, `host` for pure Python only.
ProbeIn = Literal["child", "host"]


def _frozen_facts(facts: Mapping[str, Fact]) -> Mapping[str, Fact]:
    return MappingProxyType(dict(facts))


@attrs.frozen
class ProbeResult:
    """What a probe found out: can this backend be used on this machine, and how do we know?"""

    usable: bool
    #: One line, without the backend's name: "NIXL 1.5.1 from nixl_cu12" or "libcuda.so.1 is not here".
    reason: str
    #: One line for the operator; empty when there is nothing to do.
    remedy: str = ""
    #: What was measured on the way: versions, paths, devices.
    facts: Mapping[str, Fact] = attrs.field(factory=dict, converter=_frozen_facts)

    @classmethod
    def passed(cls, reason: str, **facts: Fact) -> ProbeResult:
        """The backend can be used; `reason` says what makes it so."""
        return cls(usable=True, reason=reason, facts=facts)

    @classmethod
    def failed(cls, reason: str, remedy: str = "", **facts: Fact) -> ProbeResult:
        """The backend cannot be used; `reason` says why and `remedy` what would change that."""
        return cls(usable=False, reason=reason, remedy=remedy, facts=facts)


@attrs.frozen
class NoOptions:
    """The options of a backend that has none."""


@attrs.frozen
class HookContext:
    """The one argument of every hook; new needs become new fields, never new arguments."""

    #: The plugin API that this core speaks (`hookspecs.API`).
    api: int
    #: The version of the core.
    core_version: str


def _strings(values: object) -> frozenset[str]:
    # A bare string is iterable, and frozenset("cuda") would quietly become four devices.
    if isinstance(values, str):
        raise TypeError(f"expected a set of strings, got the string {values!r}")
    return frozenset(values)  # type: ignore[call-overload, no-any-return]


@attrs.frozen
class Offer:
    """What a hook returns: everything that the host must know about one backend of one kind.

    An offer without a `factory` is *probe only*: `tensorway doctor` reports what it finds, and selection passes it
    over.
    """

    name: str = attrs.field(validator=attrs.validators.instance_of(str))
    kind: str = attrs.field(validator=attrs.validators.instance_of(str))
    #: One line: what this backend moves, over what.
    summary: str = attrs.field(validator=attrs.validators.instance_of(str))
    #: Called once, before the first construction; must not wait for a peer and must not create a device context.
    probe: Callable[[], ProbeResult] = attrs.field(validator=attrs.validators.is_callable())
    #: `factory(options, context)` constructs the backend; the context belongs to the kind, see its hook.
    factory: Callable[[Any, Any], object] | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.is_callable())
    )
    #: An attrs class; configuration is validated into it before the factory sees any.
    options: type = attrs.field(default=NoOptions)
    #: Memory that the backend can address: `cpu`, `cuda`, `rocm`, `xpu`.
    devices: frozenset[str] = attrs.field(default=frozenset({"cpu"}), converter=_strings)
    #: What it promises beyond the contract's minimum; each promise is tested by the conformance kit.
    capabilities: frozenset[str] = attrs.field(default=frozenset(), converter=_strings)
    #: `auto` takes the highest that is usable; 50 is the middle, 0 means "only if nothing else".
    priority: int = attrs.field(default=50, validator=attrs.validators.instance_of(int))
    #: In a child process unless the probe is pure Python: a native library can abort the process that loads it.
    probe_in: ProbeIn = attrs.field(default="child", validator=attrs.validators.in_(("child", "host")))

    @options.validator
    def _options_is_attrs_class(self, _attribute: object, value: object) -> None:
        if not (isinstance(value, type) and attrs.has(value)):
            raise TypeError(f"options must be an attrs class, got {value!r}")


#: The kinds of backend, in the order in which reports list them. `hookspecs` has one hook for each.
KINDS: Final = (
    "platform",
    "transport",
    "eplb_communicator",
    "placement_policy",
    "kv_connector",
    "offloading",
    "offload_tier",
    "eviction_policy",
    "rendezvous",
    "observer",
)
