"""Names of objects that hold something wrong and could not be removed: they count as not there, and are written over.

Imports nothing of tensorway.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

#: Names that are remembered; what is forgotten is found to be wrong again where it is read.
_MOST: Final = 4096


class Spoiled:
    """A bounded set. Threads share it."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        """It is wrong."""
        with self._lock:
            self._names[name] = None
            while len(self._names) > _MOST:
                self._names.popitem(last=False)

    def discard(self, name: str) -> None:
        """It is right, or gone."""
        with self._lock:
            self._names.pop(name, None)
