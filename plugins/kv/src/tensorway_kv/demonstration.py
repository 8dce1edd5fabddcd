"""What `tensorway demo` shows of a hand-over: two reference engines, one that prefills and one that decodes.

Of the dist nothing else imports this module; it may import all of the dist, and, being for the command line, the core's
demo and its `Output`.
"""

from __future__ import annotations

import random
import statistics
from typing import TYPE_CHECKING, Final

from tensorway.cli.demonstration import HandedOver
from tensorway_kv.reference import EngineOptions, ModelShape, ServedEngine, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorway.cli.output import Output

_PROMPT: Final = 512
_FOLLOW: Final = 8
_ROUNDS: Final = 2
_CONNECTOR: Final = "handover"


def show(out: Output, transport: str) -> HandedOver:
    """What the entry point refers to."""
    shape, page, rng = ModelShape(), 16, random.Random(1)
    out.progress("    starting two engines: prefill with 2 ranks, decode with 1, five processes")
    with Site() as site:
        prefill = site.engine("prefill", shape, EngineOptions(tp=2, page_tokens=page, order="HND"), transport=transport)
        decode = site.engine("decode", shape, EngineOptions(page_tokens=page, order="HND"), transport=transport)
        prefill.ready()
        decode.ready()
        out.progress("    handing over, and computing the same prompts without")
        prompts = [[rng.randrange(shape.vocabulary) for _ in range(count)] for count in [page] + [_PROMPT] * _ROUNDS]
        rounds = [_round(prefill, decode, tokens) for tokens in prompts]
    same, seconds, recomputing = zip(*rounds[1:], strict=True)  # the first one connects them
    return HandedOver(
        _CONNECTOR, _PROMPT, -(-_PROMPT // page), _PROMPT * shape.token_bytes, all(same),
        statistics.median(seconds), statistics.median(recomputing),
    )  # fmt: skip


def _round(prefill: ServedEngine, decode: ServedEngine, tokens: Sequence[int]) -> tuple[bool, float, float]:
    """One prompt; whether the tokens are the same, seconds of the hand-over, and of computing the prompt instead."""
    ticket = prefill.generate(tokens, hand_over=True).ticket
    handed = decode.generate(tokens, _FOLLOW, ticket)
    alone = decode.generate(tokens, _FOLLOW, salt="alone")  # for which nothing is known already
    whole = handed.handed == len(tokens) and not alone.cached
    return whole and handed.tokens == alone.tokens, handed.seconds["hand_over"], alone.seconds["prefill"]
