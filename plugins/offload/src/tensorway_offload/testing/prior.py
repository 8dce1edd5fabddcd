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
from tensorway_offload.policies.hazards import Class, Hazards, Prior

if TYPE_CHECKING:
    from tensorway_offload.replay import Request

#: Classes of fewer prompts than this are left to be learned.
_LEAST_SHARE = 0.001


def fitted(requests: list[Request]) -> Prior:
    """What a trace says, seen as a whole."""
    hazards = Hazards(Prior(), forget=False)
    for request in requests:
        hazards.ended(request.keys)
    tables = hazards.settled()
    root = tables[()]
    classes: dict[Class, tuple[float, float]] = {}
    for words, table in tables.items():
        share = table.exposed[0] / root.exposed[0]
        if len(words) > 1 and share >= _LEAST_SHARE and table.parent is not None:
            classes[words] = (_short(share), _short(table.often(10 * hazards.length)))
    turns = {
        words[0]: (_short(table.exposed[0] / root.exposed[0]), tuple(map(_short, table.hazard)))
        for words, table in tables.items()
        if len(words) == 1
    }
    all_of_them = tuple(map(_short, root.hazard))
    return Prior(round(hazards.length, 1), all_of_them, dict(sorted(turns.items())), dict(sorted(classes.items())))


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def source(prior: Prior) -> str:
    """The module: words that `Prior.parse` reads."""
    words = [f"length {prior.length} all", *map(str, prior.hazard)]
    for turn, (share, hazard) in prior.turns.items():
        words += [f"turn {turn} {share}", *map(str, hazard)]
    for name, (share, factor) in prior.classes.items():
        words.append(f"class {' '.join(map(str, name))} {share} {factor}")
    lines = "\n".join(textwrap.wrap(" ".join(words), 118))
    return (
        '"""What `foresight` expects before it has seen anything. Data that `tensorway_offload.testing.prior` made of\n'
        "the conversation trace that was published with Mooncake (FAST 2025, Apache-2.0). May import `hazards`.\n"
        '"""\n\nfrom __future__ import annotations\n\nfrom typing import Final\n\n'
        "from tensorway_offload.policies.hazards import Prior\n\n"
        f'CONVERSATIONS: Final = Prior.parse("""\n{lines}\n""")\n'
    )


if __name__ == "__main__":
    Output().line(source(fitted(read(Path(sys.argv[1]), Output()))).rstrip())
