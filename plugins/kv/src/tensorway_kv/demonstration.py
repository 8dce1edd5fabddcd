"""What `tensorway demo` shows of a hand-over: two reference engines, one that prefills and one that decodes.

Of the dist nothing else imports this module; it may import all of the dist, and, being for the command line, the core's
demo. Prompts of several lengths are handed over, and computed again where they went, so that both times are of one
minute.
"""

from __future__ import annotations

import random
import statistics
from typing import TYPE_CHECKING, Final

import attrs

from tensorway.cli.charts import Chart, Series
from tensorway.cli.demonstration import Ratio, Shown, Stage, memmove
from tensorway_kv.reference import EngineOptions, ModelShape, ServedEngine, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

_LENGTHS: Final = (32, 64, 128, 256, 512, 1024)
_QUICK: Final = (64, 512)
_PAGE: Final = 16
#: Tokens that both continuations of a prompt have.
_FOLLOW: Final = 8
_ROUNDS: Final = 2
#: Ranks of both engines, and their schedulers.
_PROCESSES: Final = 5


@attrs.frozen
class _Length:
    """What prompts of one length took, in seconds."""

    tokens: int
    nbytes: int
    right: bool
    handing_over: float
    computing: float
    copying: float


def show(stage: Stage) -> Shown:
    """What the entry point refers to."""
    shape, rng, found = ModelShape(), random.Random(1), []
    stage.say(0.0, "starting two engines: prefill with 2 ranks, decode with 1")
    with stage.processes(), Site() as site:
        engines = [
            site.engine(name, shape, _options(ranks), transport=stage.transport)
            for name, ranks in (("prefill", 2), ("decode", 1))
        ]
        for engine in engines:
            engine.ready(stage.left())
        prefill, decode = engines
        _round(stage, prefill, decode, _prompt(rng, shape, _PAGE))  # connects them
        lengths = _QUICK if stage.quick else _LENGTHS
        for number, tokens in enumerate(lengths):
            stage.say(0.2 + 0.8 * number / len(lengths), f"prompts of {tokens} tokens: handed over, and computed again")
            rounds = [
                _round(stage, prefill, decode, _prompt(rng, shape, tokens))
                for _ in range(1 if stage.quick else _ROUNDS)
            ]
            same, handing, computing = zip(*rounds, strict=True)
            nbytes = tokens * shape.token_bytes
            found.append(
                _Length(
                    tokens, nbytes, all(same), statistics.median(handing), statistics.median(computing), memmove(nbytes)
                )
            )
    return _shown(stage.transport, found)


def _options(ranks: int) -> EngineOptions:
    return EngineOptions(tp=ranks, page_tokens=_PAGE, blocks=256, order="HND")


def _prompt(rng: random.Random, shape: ModelShape, tokens: int) -> list[int]:
    return [rng.randrange(shape.vocabulary) for _ in range(tokens)]


def _round(
    stage: Stage, prefill: ServedEngine, decode: ServedEngine, tokens: Sequence[int]
) -> tuple[bool, float, float]:
    """One prompt; whether the tokens are the same, seconds of the hand-over, and of computing the prompt instead."""
    ticket = prefill.generate(tokens, hand_over=True, seconds=stage.left()).ticket
    handed = decode.generate(tokens, _FOLLOW, ticket, seconds=stage.left())
    alone = decode.generate(tokens, _FOLLOW, salt="alone", seconds=stage.left())  # for which nothing is known already
    whole = handed.handed == len(tokens) and not alone.cached
    return whole and handed.tokens == alone.tokens, handed.seconds["hand_over"], alone.seconds["prefill"]


def _shown(transport: str, found: Sequence[_Length]) -> Shown:
    longest, right = found[-1], all(length.right for length in found)
    same = "the same" if right else "NOT THE SAME"
    text = (
        f"Prompts of {found[0].tokens} to {longest.tokens} tokens went from one engine to another, which goes on with "
        f"{same} tokens as if it had computed them itself."
    )
    lines = [
        Series(name, tuple(getattr(length, what) * 1e3 for length in found))
        for name, what in (("computing the prompt", "computing"), (f"over {transport}", "handing_over"))
    ]
    sizes = tuple(_size(length.nbytes) for length in found)
    chart = Chart(
        "Time of a hand-over", "keys and values of the prompt", tuple(lines), sizes, up="milliseconds", log=True
    )
    moving = f"handing over {longest.tokens} tokens"
    ratios = (
        Ratio(moving, "computing the prompt", longest.handing_over, longest.computing),
        Ratio(moving, "a memmove", longest.handing_over, longest.copying),
    )
    moved, headline = sum(length.nbytes for length in found), (ratios[0].text, ratios[0].beside)
    return Shown(transport, _PROCESSES, moved, right, headline, text, ratios, (chart,))


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"
