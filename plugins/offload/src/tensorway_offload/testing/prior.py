"""Makes `policies/prior.py`: what `foresight` expects before it has seen anything, from a trace.

`python -m tensorway_offload.testing.prior TRACE > prior.py`. May import all of the dist.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from tensorway.cli.output import Output
from tensorway_offload.command.traces import read
from tensorway_offload.policies.hazards import Hazards, Prior

if TYPE_CHECKING:
    from tensorway_offload.replay import Request

#: Classes of fewer blocks than this part of all are left to be learned.
_LEAST_SHARE = 0.001


def fitted(requests: list[Request]) -> Prior:
    """What a trace says, seen as a whole."""
    hazards = Hazards(Prior(), forget=False)
    for request in requests:
        hazards.ended(request.keys)
    least = _LEAST_SHARE * hazards.root.exposed[0]
    rows = {words: table for words, table in sorted(hazards.seen().items()) if table.exposed[0] >= least}
    classes = {words: (table.exposed[0], _trimmed(table.back)) for words, table in rows.items()}
    return Prior(round(hazards.length, 1), classes)


def _trimmed(back: list[float]) -> tuple[float, ...]:
    """Without the zeros at the end."""
    return tuple(back[: max((at for at, count in enumerate(back, 1) if count), default=0)])


def source(prior: Prior) -> str:
    """The module: words that `Prior.parse` reads."""
    words = [str(prior.length)]
    for name, (blocks, back) in prior.classes.items():
        words += [";", *map(str, name), ":", *(f"{count:.0f}" for count in (blocks, *back))]
    lines = "\n".join(textwrap.wrap(" ".join(words), 118))
    return (
        '"""What `foresight` begins with, as if it had seen it. Data that `tensorway_offload.testing.prior` made of\n'
        "the conversation trace that was published with Mooncake (FAST 2025, Apache-2.0). May import `hazards`.\n"
        '"""\n\nfrom __future__ import annotations\n\nfrom typing import Final\n\n'
        "from tensorway_offload.policies.hazards import Prior\n\n"
        f'CONVERSATIONS: Final = Prior.parse("""\n{lines}\n""")\n'
    )


if __name__ == "__main__":
    Output().line(source(fitted(read(Path(sys.argv[1]), Output()))).rstrip())
