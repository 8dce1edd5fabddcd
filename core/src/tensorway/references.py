"""What a text such as "package.module:attribute" refers to.

Ground: imports nothing of tensorway.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def resolve(reference: str) -> Any:
    """Import the module and walk to the attribute; raises whatever the module raises, and `AttributeError`."""
    module, _, path = reference.partition(":")
    target: Any = import_module(module)
    for part in path.split("."):
        target = getattr(target, part)
    return target
