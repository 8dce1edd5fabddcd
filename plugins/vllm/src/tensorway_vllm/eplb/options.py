"""What an operator asks of vLLM's expert balancing with `--additional-config`, which every worker has in its config.

May import attrs, and the core's check of options. An example:

    --additional-config '{"tensorway": {"eplb": {"communicator": "onesided", "policy": "incremental"}}}'
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Final

import attrs

from tensorway.errors import OptionsInvalid
from tensorway.plugins.options import fitted

#: In vLLM's `additional_config`, under which others have their own keys.
KEY: Final = "tensorway"
_ASKED: Final = f"--additional-config was given with {KEY!r}."
_ASKED_EPLB: Final = f"--additional-config was given with {KEY!r}, 'eplb'."
_SEE: Final = "See docs/vllm-eplb.md."
#: As near as a slip of the finger is.
_NEAR: Final = 0.8

_SECONDS: Final = (attrs.validators.gt(0.0), attrs.validators.le(3600.0))


@attrs.frozen
class EplbOptions:
    """What Tensorway does in vLLM's expert balancing. vLLM's own does what is not named here."""

    #: Which `eplb_communicator` moves weights: a name, `auto`, or `measured`. Empty for vLLM's own.
    communicator: str = ""
    #: Its options; for `measured`, those of each by its name.
    options: dict[str, object] = attrs.field(factory=dict, repr=False)
    #: Which `placement_policy` decides where experts are: a name, or `auto`. Empty for vLLM's own.
    policy: str = ""
    policy_options: dict[str, object] = attrs.field(factory=dict, repr=False)
    #: Rows that all ranks together may receive in one layer; none is no limit.
    receives_per_layer: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.ge(0))
    )
    #: Where ranks meet, and its options. Empty: the first rank runs a rendezvous for this group alone.
    rendezvous: str = ""
    rendezvous_options: dict[str, object] = attrs.field(factory=dict, repr=False)
    #: Where that listens, as a policy of addresses. `auto`: this host alone if all ranks are on it, else what
    #: TENSORWAY_HOST says, else where vLLM itself says that this host is (`VLLM_HOST_IP`).
    host: str = "auto"
    #: Seconds that opening may take, and the moves of one layer.
    open_seconds: float = attrs.field(default=60.0, validator=_SECONDS)
    layer_seconds: float = attrs.field(default=30.0, validator=_SECONDS)

    def __attrs_post_init__(self) -> None:
        if not self.communicator and not self.policy:
            raise ValueError("neither a communicator nor a policy is named, so nothing is asked for")
        for name, of in (
            ("options", "communicator"),
            ("policy_options", "policy"),
            ("rendezvous_options", "rendezvous"),
        ):
            if getattr(self, name) and not getattr(self, of):
                raise ValueError(f"{name} are given, and no {of}")


@attrs.frozen
class _All:
    """All that an operator may ask under `KEY`."""

    eplb: dict[str, object] | None = None


def asked(additional: object) -> EplbOptions | None:
    """What is asked for in vLLM's `additional_config`; None if nothing is.

    Raises `OptionsInvalid` for what cannot be meant, with the nearest name.
    """
    if not isinstance(additional, Mapping):
        return None  # an object of somebody else, who hashes it by himself
    if KEY not in additional:
        if near := difflib.get_close_matches(KEY, [key for key in additional if isinstance(key, str)], 1, _NEAR):
            true = f"It has the key {near[0]!r}, which nothing of vLLM or Tensorway reads."
            raise OptionsInvalid("--additional-config was given.", true, f"Did you mean {KEY!r}?")
        return None
    given = fitted(_All, additional[KEY], _ASKED, _SEE).eplb
    return None if given is None else fitted(EplbOptions, given, _ASKED_EPLB, _SEE)
