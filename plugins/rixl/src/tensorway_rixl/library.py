"""NIXL for ROCm, loaded at the first use of one of `Agent`, `AgentConfig` and `Telemetry` (PEP 562).

May import tensorway's ground and tensorway-nixl. Two packages qualify: `nixl_rocm`, built from NIXL, and before it
ROCm's own fork `rixl`. The `rixl` on the public index is neither: a client of a web service that happens to have the
name, with a higher version number than AMD's, so that an upgrade replaces AMD's with it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from importlib.machinery import ModuleSpec, PathFinder
from typing import Final

from tensorway.native import Absent, NativeLibrary, lazy_attributes
from tensorway_nixl.library import ENVIRONMENT, SYMBOLS

_INSTALL: Final = "install AMD's build of nixl_rocm (it is not on the public index)"
_REMEDY: Final = f"{_INSTALL[0].upper()}{_INSTALL[1:]}."


def impostor() -> Absent | None:
    """What is installed as `rixl` and is not AMD's, told by what it lacks; None when there is no such thing."""
    spec, version = _package(), _version()
    if importlib.util.find_spec("nixl_rocm") is not None or (spec is None and version is None):
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    # Not find_spec("rixl._api"), which would import whatever this rixl is.
    lacks = [name for name in ("_api", "_bindings") if PathFinder.find_spec(f"rixl.{name}", places) is None]
    if not lacks:
        return None
    if version is None:
        place = spec.origin if spec else None
        return Absent(f"{place} is not AMD's rixl: it has no {lacks[0]}", f"Take it off the path, then {_INSTALL}.")
    if spec is None and importlib.util.find_spec("rixl_client") is not None:
        what = "an unrelated client of a web service (it has rixl_client and no rixl._api)"
    else:
        what = f"not AMD's: it has no rixl.{lacks[0]}"
    return Absent(f"the installed rixl {version} is {what}", f"pip uninstall rixl, then {_INSTALL}.")


def _explain() -> Absent | None:
    found = [name for name in ("nixl_rocm", "rixl") if importlib.util.find_spec(name) is not None]
    if found == ["rixl"] and _package() is None:
        # A folder called rixl in the current directory counts as a package without code, and importing it "fails".
        return impostor() or Absent("nixl_rocm is not installed; rixl is not installed", _REMEDY)
    return impostor()


def _package() -> ModuleSpec | None:
    spec = importlib.util.find_spec("rixl")
    return spec if spec is not None and spec.origin is not None else None


def _version() -> str | None:
    try:
        return importlib.metadata.version("rixl")
    except importlib.metadata.PackageNotFoundError:
        return None


LIBRARY: Final = NativeLibrary(
    name="NIXL for ROCm",
    modules=("nixl_rocm", "rixl"),
    symbols=SYMBOLS,
    remedy=_REMEDY,
    environment=ENVIRONMENT,
    explain=_explain,
)

__getattr__ = lazy_attributes(LIBRARY, __name__)
