"""What a user may set in `kv_connector_extra_config` of `TensorwayConnector`.

May import attrs, and the core's plugin host. What is wrong is an error when the engine starts: a name that nobody
offers, an option that its backend does not have, a value of another type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from tensorway.plugins import host
from tensorway.plugins.options import fitted, validated
from tensorway.rendezvous.contract import check_key

_ASKED: Final = "kv_connector_extra_config was given to TensorwayConnector."
_SEE: Final = "See docs/vllm.md."


def _seconds(low: float) -> list[Callable[[Any, Any, Any], Any]]:
    return [attrs.validators.ge(low), attrs.validators.le(3600.0)]


@attrs.frozen
class HandoverOptions:
    """Options of `TensorwayConnector`."""

    #: Where engines meet, and its options.
    rendezvous: str
    rendezvous_options: dict[str, object] = attrs.field(factory=dict, repr=False)
    #: Which `kv_connector` hands over, and its options.
    connector: str = "handover"
    options: dict[str, object] = attrs.field(factory=dict, repr=False)
    #: By which name engines know their model; empty for the one that vLLM was given, which may be a path.
    model: str = ""
    #: What engines must agree on beside model, types and layout, such as a revision of the weights.
    facts: dict[str, str] = attrs.field(factory=dict)
    #: The KV cache layout that vLLM is asked for, or empty for the one that its attention prefers. A page of a layer
    #: must be one piece: LBHNC, LBNHC, BLHNC or BLNHC. With the last two all layers of a page are one piece.
    layout: str = attrs.field(default="LBHNC", validator=attrs.validators.in_(("", "LBHNC", "LBNHC", "BLHNC", "BLNHC")))
    #: Of all pages, how much may be kept for other engines at once; what is more is not handed over.
    max_kept: float = attrs.field(default=0.9, validator=[attrs.validators.gt(0.0), attrs.validators.le(1.0)])
    #: Seconds for which the start of an engine waits for the rendezvous; afterwards it is sought in the background.
    start_seconds: float = attrs.field(default=5.0, validator=_seconds(0.0))
    #: Seconds that opening one side may take.
    open_seconds: float = attrs.field(default=60.0, validator=_seconds(0.1))
    #: Seconds after which a side that could not be opened, or broke, is opened anew; each time twice as many, up to 60.
    retry_seconds: float = attrs.field(default=1.0, validator=_seconds(0.01))
    #: Seconds for which a request waits to be told whether its blocks can be had; then it is computed.
    later_seconds: float = attrs.field(default=10.0, validator=_seconds(0.0))
    #: Seconds after which a request whose blocks have not come is given up, whatever the backend's own deadline is.
    parked_seconds: float = attrs.field(default=120.0, validator=_seconds(0.1))


def options_of(extra: Mapping[str, object]) -> HandoverOptions:
    """Options from vLLM's mapping; raises `OptionsInvalid`, with the nearest name for one that is unknown."""
    return fitted(HandoverOptions, dict(extra), _ASKED, _SEE)


def check(options: HandoverOptions, engine: str, *, memory: bool) -> None:
    """Raise what says which backend is not there, or what is wrong with its options or the engine's name.

    With `memory`, on the side that will move blocks, the transport is looked at, too, if the connector names one.
    """
    check_key(engine, "engine_id")  # under which the engine is known where engines meet
    _checked("rendezvous", options.rendezvous, options.rendezvous_options)
    of = _checked("kv_connector", options.connector, options.options)
    transport: Any = getattr(of, "transport", None)
    if memory and isinstance(transport, str):
        _checked("transport", transport, getattr(of, "transport_options", {}))


def _checked(kind: str, name: str, given: Mapping[str, object]) -> object:
    """The options of a backend that would be taken, as it will see them."""
    plugins = host()
    decision = plugins.decide(kind, name)
    if decision.winner is None:
        raise plugins.refusal(decision)
    offer = plugins.named(decision.winner.label, kind)[0].offer
    assert offer is not None, "a winner has an offer"
    return validated(offer, given)
