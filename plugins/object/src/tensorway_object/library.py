"""obstore, as far as the tier uses it: late, once, and with the answer kept. May import the ground."""

from __future__ import annotations

from typing import Final

from tensorway.native import NativeLibrary, lazy_attributes

INSTALL: Final = 'pip install "tensorway[object]"'

LIBRARY: Final = NativeLibrary(
    name="obstore",
    modules=("obstore",),
    symbols={
        "version": "_obstore:__version__",
        "from_url": "store:from_url",
        "MemoryStore": "store:MemoryStore",
        "AlreadyExists": "exceptions:AlreadyExistsError",
        "Precondition": "exceptions:PreconditionError",
        "NotSupported": "exceptions:NotSupportedError",
        "Denied": "exceptions:PermissionDeniedError",
        "Unauthenticated": "exceptions:UnauthenticatedError",
        "Trouble": "exceptions:BaseError",
    },
    remedy=INSTALL,
)

__getattr__ = lazy_attributes(LIBRARY, __name__)
