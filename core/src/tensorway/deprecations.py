"""What will be gone, and when: one constant for each deprecation, and what is done where somebody meets it.

Ground: imports `errors`. There is none yet. One is a class for the version that removes it and a constant here::

    class TensorwayRemovedIn04Warning(TensorwayDeprecationWarning):
        removed_in = (0, 4)

    OLD_HOOK = TensorwayRemovedIn04Warning("The hook `old` is called `new` now.", since=(0, 2), anchor="the-hook-old")

and a section of that anchor on the page of deprecations. A hook or an argument of one names it where it is specified:
`@hookspec(warn_on_impl=OLD_HOOK)`, `@hookspec(warn_on_impl_args={"old": OLD_ARGUMENT})`. Code calls `announce`.
"""

from __future__ import annotations

import re
import sys
import warnings
from typing import ClassVar

from tensorway.errors import TensorwayError

Minor = tuple[int, int]


class TensorwayDeprecationWarning(DeprecationWarning):
    """Base of all: warned of in two minor versions, an error in the `.0` that removes it, gone in the `.1`."""

    #: The minor version that removes it.
    removed_in: ClassVar[Minor]

    def __init__(self, text: str, since: Minor, anchor: str) -> None:
        self.text, self.since, self.anchor = text, since, anchor
        major, minor = self.removed_in
        super().__init__(f"{text} It is an error from tensorway {major}.{minor}.0 on: docs/deprecations.md#{anchor}")

    @property
    def due(self) -> bool:
        """Whether this core is of the version that removes it: then it is an error and no warning."""
        return running()[:2] >= self.removed_in


def announce(deprecation: TensorwayDeprecationWarning, asked: str, stacklevel: int = 2) -> None:
    """Warn whoever called what calls this; raises where it is due. `asked` is what an error says first."""
    if deprecation.due:
        to_do = f"See docs/deprecations.md#{deprecation.anchor}, or stay with a tensorway below {_dotted(deprecation)}."
        raise TensorwayError(asked, deprecation.text, to_do)
    warnings.warn(deprecation, stacklevel=stacklevel + 1)


def running() -> tuple[int, ...]:
    """The version of this core, as numbers."""
    package = sys.modules["tensorway"]  # of which this is a part, and whose rooms the ground does not import
    return tuple(int(part) for part in re.findall(r"\d+", package.__version__)[:3])


def _dotted(deprecation: TensorwayDeprecationWarning) -> str:
    return ".".join(map(str, deprecation.removed_in))
