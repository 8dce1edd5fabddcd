"""What is put around names of vLLM's `eplb_state` when that is imported: it asks the config, and calls through.

May import this package's `options` and `expected`; vllm, and what moves weights, only for an operator who asks. So an
engine without expert balancing never imports this, and one that does not ask runs vLLM's own code with vLLM's own
arguments.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any, Final

from tensorway._logging import logger
from tensorway_vllm.eplb import expected, options
from tensorway_vllm.eplb.options import EplbOptions

_log = logger("vllm")
#: On vLLM's module: what is around its names.
MARK: Final = "tensorway_around"


def attach(module: ModuleType) -> None:
    """Put ours around the names of `expected.REPLACED`; again changes nothing, and a module that was reloaded is new.

    A vLLM that lacks one of them is left as it is there: an operator who asks is refused by what is left to ask at.
    """
    before: _Hook | None = getattr(module, MARK, None)
    if before is not None and before.is_around(module):
        return
    hook = _Hook()
    setattr(module, MARK, hook)
    hook.put_around(module)


class _Hook:
    """What this process was asked for, and the names that ask for it."""

    def __init__(self) -> None:
        #: Of the state that was made last; models are added, and communicators made anew, also where no config is set.
        self._asked: EplbOptions | None = None
        #: vLLM's class in which the state is checked.
        self._of: Any = None

    def is_around(self, module: ModuleType) -> bool:
        """Whether this is around what is there now: a reload has made it anew."""
        return self._of is not None and self._of is getattr(module, "EplbState", None)

    def put_around(self, module: ModuleType) -> None:
        """Replace the names, as far as they are there."""
        self._of = getattr(module, "EplbState", None)
        create, policies = (getattr(module, name, None) for name in ("create_eplb_communicator", "EPLB_POLICIES"))
        if self._of is not None:
            self._of.__init__ = self._checking(self._of.__init__)
        if create is not None:
            module.create_eplb_communicator = self._creating(create)  # type: ignore[attr-defined]
        if isinstance(policies, dict):
            module.EPLB_POLICIES = _Policies(policies, self)  # type: ignore[attr-defined]
        if self._of is None and create is None:
            _log.warning(
                "vLLM's expert balancing has neither EplbState nor create_eplb_communicator: what --additional-config "
                "asks of Tensorway there is not heard. See: tensorway vllm doctor."
            )

    @property
    def asked(self) -> EplbOptions | None:
        """What the operator asks for, where vLLM says its config; what was said last, where it does not."""
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if config is not None:
            self._asked = options.asked(config.additional_config)
        return self._asked

    def _checking(self, construct: Any) -> Any:
        @functools.wraps(construct)
        def checked(state: Any, *given: Any, **named: Any) -> None:
            if self.asked is not None:
                expected.check()
            construct(state, *given, **named)

        return checked

    def _creating(self, create: Any) -> Any:
        @functools.wraps(create)
        def created(*given: Any, **named: Any) -> Any:
            asked = self.asked
            if asked is None or not asked.communicator:
                return create(*given, **named)
            expected.check()
            from tensorway_vllm.eplb.communicator import TensorwayEplbCommunicator

            call = inspect.signature(create).bind(*given, **named).arguments
            return TensorwayEplbCommunicator(
                asked, call["group_coordinator"], call["expert_weights"], call["expert_buffer"]
            )

        return created


class _Policies(dict[str, Any]):
    """vLLM's policies by name; whichever is looked up, who asks gets the one that is asked for."""

    def __init__(self, own: dict[str, Any], hook: _Hook) -> None:
        super().__init__(own)
        self._hook = hook

    def __getitem__(self, name: str) -> Any:
        asked = self._hook.asked
        if asked is None or not asked.policy:
            return super().__getitem__(name)
        expected.check()
        from tensorway_vllm.eplb.policy import TensorwayEplbPolicy

        return TensorwayEplbPolicy(asked)
