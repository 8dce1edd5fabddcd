"""Prefill in one engine and decode in another, over every transport that is installed here and can hand over."""

from __future__ import annotations

import random

import pytest

import tensorway
from tensorway.errors import BackendNotFound, BackendUnavailable
from tensorway.metrics import total

pytest.importorskip("tensorway_kv", reason='needs the movement: pip install "tensorway[kv]"')

from tensorway_kv.reference import EngineOptions, Model, ModelShape, Request, Site

SHAPE = ModelShape(layers=2)
MODEL = Model(SHAPE)
SECONDS = 60.0
PROMPTS = {f"q{seed}": tuple(random.Random(seed).randrange(256) for _ in range(20 + 23 * seed)) for seed in range(4)}


def usable(transport):
    """Skip, and say what to install, unless it can be used here."""
    try:
        tensorway.create("transport", transport).close()
    except (BackendNotFound, BackendUnavailable) as error:
        pytest.skip(f"{error.true} {error.to_do}")


@pytest.fixture
def site():
    with Site() as made:
        yield made


@pytest.mark.parametrize("transport", ["local", "nixl", "auto"])
def test_prefill_here_decode_there_and_back_again(site, transport):
    usable(transport)
    prefill = site.engine("prefill", SHAPE, EngineOptions(tp=2, page_tokens=8), transport=transport)
    decode = site.engine("decode", SHAPE, EngineOptions(page_tokens=6, order="HND"), transport=transport)
    for name, prompt in PROMPTS.items():
        prefill.submit(Request(name, prompt, 1, hand_over=True))
    for name, prompt in PROMPTS.items():
        decode.submit(Request(name, prompt, 6, prefill.wait(name, SECONDS).ticket, hand_over=True))
    answers = {name: decode.wait(name, SECONDS) for name in PROMPTS}
    for name, prompt in PROMPTS.items():
        assert MODEL.continued(prompt, 6) == answers[name].tokens
        assert (len(prompt), 0) == (answers[name].handed, answers[name].failed)
        turn = (*prompt, *answers[name].tokens, 7)
        back = prefill.generate(turn, 3, answers[name].ticket)
        assert MODEL.continued(turn, 3) == back.tokens
        assert len(prompt) + 5 == back.cached + back.handed
    for engine in (prefill, decode):
        engine.rest(SECONDS)
        assert (engine.options.blocks, 0) == (engine.free, total(engine.statistics(), "kv_leases"))
