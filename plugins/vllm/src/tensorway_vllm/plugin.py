"""What vLLM calls in each of its processes: tells it names, and where the classes are.

May import the standard library, and of this package nothing: an engine that uses none of the names must not notice that
they are there. vLLM's factories take half a second of a processor to import. So where they are not imported yet, they
are told the names when they are, by whomever.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

SPEC: Final = ("TensorwayOffloadingSpec", "tensorway_vllm.offloading.spec")
CONNECTOR: Final = ("TensorwayOffloadingConnector", "tensorway_vllm.offloading.connector")
HANDOVER: Final = ("TensorwayConnector", "tensorway_vllm.handover")
#: As the entry point is called, and so as `VLLM_PLUGINS` must name it.
PLUGIN: Final = "tensorway"

#: In which module which class has which method, and what it is told.
_FACTORIES: Final[dict[str, tuple[str, str, tuple[tuple[str, str], ...]]]] = {
    "vllm.distributed.kv_transfer.kv_connector.factory": (
        "KVConnectorFactory",
        "register_connector",
        (CONNECTOR, HANDOVER),
    ),
    "vllm.v1.kv_offload.factory": ("OffloadingSpecFactory", "register_spec", (SPEC,)),
}

#: Where an operator may ask for ours; see `eplb.hook`, which is imported with it.
_BALANCING: Final = "vllm.distributed.eplb.eplb_state"
_WAITED: Final = (*_FACTORIES, _BALANCING)

_log = logging.getLogger(__name__)
#: What was said in this process, so that it is said once: vLLM loads plugins in several places.
_said: set[str] = set()
#: Whether the names were registered in this process, or wait to be.
_registered = False


def register() -> None:
    """Have the names registered with vLLM's factories; again changes nothing. An engine starts, whatever goes wrong."""
    global _registered
    _registered = True
    if not any(isinstance(finder, _Waiting) for finder in sys.meta_path):  # also for modules that are loaded again
        sys.meta_path.insert(0, _Waiting())
    for name in _WAITED:
        if name in sys.modules:
            tell(sys.modules[name])


def needed(name: str) -> None:
    """A class of ours is used. Where vLLM has not loaded the plugin, say so, and have all names registered after all.

    Then it was found by its module's path. Without the names, statistics of children of `MultiConnector`, which vLLM
    looks up by name, end the process that serves.
    """
    if _registered:
        return
    register()
    allowed = getattr(sys.modules.get("vllm.envs"), "VLLM_PLUGINS", None)
    why = "is not installed where vLLM looks for plugins"
    if allowed is not None:
        why = f"is not in VLLM_PLUGINS ({','.join(allowed)})"
    _say(
        f"{name} was found by its module's path, for vLLM did not load the plugin {PLUGIN!r}: it {why}. "
        f"Add {PLUGIN} to VLLM_PLUGINS, or unset it. See: tensorway vllm doctor."
    )


def tell(module: ModuleType) -> None:
    """Tell a factory the names that it does not know; let vLLM's expert balancing ask for ours."""
    if module.__name__ == _BALANCING:
        from tensorway_vllm.eplb.hook import attach

        attach(module)
        return
    owner, method, names = _FACTORIES[module.__name__]
    try:
        factory: Any = getattr(module, owner)
        for name, where in names:
            if name not in factory._registry:
                getattr(factory, method)(name, where, name)
            elif not _is_ours(factory._registry[name], where):
                _say(
                    f"Somebody else has registered {name} with vLLM's {owner}, and vLLM will take theirs. "
                    f"For Tensorway's, give its module's path: {where}."
                )
    except Exception as error:  # of any vLLM, which may have changed what is used here
        _say(
            f"Tensorway is not registered with {module.__name__}, which is not as expected "
            f"({type(error).__name__}: {error}). See: tensorway vllm doctor."
        )


def _is_ours(loader: Any, where: str) -> bool:
    """Whether what a factory keeps for a name loads our module: it keeps a function that knows the module's path."""
    return any(cell.cell_contents == where for cell in getattr(loader, "__closure__", None) or ())


def _say(line: str) -> None:
    if line not in _said:
        _said.add(line)
        _log.warning("%s", line)


class _Waiting(MetaPathFinder):
    """Sees factories being imported; all else it leaves alone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What others find, and afterwards the names are told."""
        if fullname not in _WAITED:
            return None
        for finder in sys.meta_path:
            found = None if finder is self else finder.find_spec(fullname, path, target)
            if found is not None and found.loader is not None:
                return _then_told(found)
        return None


def _then_told(spec: ModuleSpec) -> ModuleSpec:
    loader: Any = spec.loader
    execute = loader.exec_module

    def exec_and_tell(module: ModuleType) -> None:
        execute(module)
        tell(module)

    loader.exec_module = exec_and_tell
    return spec
