"""The reference engine alone: the same bits whichever way a token is computed, and no block lost."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorway.errors import LayoutInvalid, OptionsInvalid
from tensorway_kv.reference import EngineOptions, Model, ModelShape, Request
from tensorway_kv.reference.cache import BlockPool, names_of
from tensorway_kv.reference.engine import alone
from tensorway_kv.reference.model import Shard

SHAPE = ModelShape(layers=2)
MODEL = Model(SHAPE)
SECONDS = 60.0


def prompt(length, seed=1):
    return tuple(random.Random(seed).randrange(SHAPE.vocabulary) for _ in range(length))


def kept(engine, options, tokens):
    """Keys and values of these tokens, as the engine's pages hold them: layer, token, head of the model, number."""
    blocks = engine.pool.find(names_of(tokens, options.page_tokens))
    assert len(blocks) == len(tokens) // options.page_tokens
    layers = []
    for layer in range(SHAPE.layers):
        read = [worker.pages.read(layer, blocks, len(tokens)) for worker in engine.ranks.workers]
        layers.append([np.concatenate(one, axis=1) for one in zip(*read, strict=True)])
    return np.array(layers)


def dense(tokens):
    """The same from all tokens at once, without an engine."""
    shard, hidden, layers = Shard(SHAPE), MODEL.embedded(tokens), []
    for layer in range(SHAPE.layers):
        queries, keys, values = shard.projected(layer, hidden)
        layers.append([keys, values])
        hidden = MODEL.mixed(layer, hidden, shard.attended(queries, keys, values, 0))
    return np.array(layers, np.float32)


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(),
        EngineOptions(chunk=1, page_tokens=4),
        EngineOptions(chunk=7, page_tokens=4),
        EngineOptions(chunk=29, page_tokens=6, order="HND"),
        EngineOptions(tp=2, chunk=11, page_tokens=3),
        EngineOptions(tp=4, chunk=16, page_tokens=12, order="HND"),
    ],
    ids=lambda one: f"tp{one.tp}-chunk{one.chunk}-page{one.page_tokens}-{one.order}",
)
def test_a_token_has_the_same_bits_whichever_way_it_is_computed(options):
    engine, tokens = alone(SHAPE, options), prompt(48)
    engine.submit(Request("other", prompt(30, 2)))  # so that steps compute rows of both
    engine.submit(Request("one", tokens))
    engine.run(SECONDS)
    np.testing.assert_array_equal(dense(tokens).view(np.uint32), kept(engine, options, tokens).view(np.uint32))


def test_values_are_where_sums_of_them_are_exact():
    found = dense(prompt(200))
    assert (found * 4096 == np.rint(found * 4096)).all()
    assert 0.1 < np.abs(found).mean() < 8


@pytest.mark.parametrize(
    "options",
    [EngineOptions(), EngineOptions(tp=2, chunk=9, page_tokens=3), EngineOptions(tp=8, order="HND", page_tokens=5)],
    ids=["one", "two", "eight"],
)
def test_tokens_are_those_of_the_model_and_every_block_comes_back(options):
    engine, free = alone(SHAPE, options), options.blocks
    prompts = [prompt(length, length) for length in (1, 16, 33, 50)]
    for number, tokens in enumerate(prompts):
        engine.submit(Request(f"q{number}", tokens, 8))
    engine.run(SECONDS)
    for number, tokens in enumerate(prompts):
        outcome = engine.take(f"q{number}")
        assert MODEL.continued(tokens, 8) == outcome.tokens
        assert (len(tokens) + 7, 0, 0) == (outcome.computed, outcome.handed, outcome.failed)
        assert engine.take(f"q{number}") is None
    assert (free, False) == (engine.pool.free, engine.busy)


def test_every_part_of_a_prompt_matters():
    tokens = list(prompt(200))
    said = {MODEL.continued(tokens, 6)}
    for place in range(0, 200, 20):
        changed = list(tokens)
        changed[place] ^= 5
        said.add(MODEL.continued(changed, 6))
    assert len(said) == 11


def test_other_seeds_are_other_models():
    assert MODEL.continued(prompt(20), 6) != Model(ModelShape(layers=2, seed=2)).continued(prompt(20), 6)


# -- the prefix cache


def test_a_prefix_that_was_computed_is_not_computed_again():
    engine, first = alone(SHAPE, EngineOptions(page_tokens=4)), prompt(40)
    second = (*first[:22], *prompt(10, 3))
    salted = Request("salted", first, 4, salt="another tenant")
    outcomes = []
    for one in (Request("first", first, 4), Request("again", first, 4), Request("second", second, 4), salted):
        engine.submit(one)
        engine.run(SECONDS)
        outcomes.append(engine.take(one.id))
    assert [0, 36, 20, 0] == [one.cached for one in outcomes]
    assert [43, 7, 15, 43] == [one.computed for one in outcomes]
    assert outcomes[0].tokens == outcomes[1].tokens == outcomes[3].tokens == MODEL.continued(first, 4)
    assert MODEL.continued(second, 4) == outcomes[2].tokens


def test_what_was_chosen_is_known_to_the_next_turn():
    engine = alone(SHAPE, EngineOptions(page_tokens=4))
    engine.submit(Request("one", prompt(10), 9))
    engine.run(SECONDS)
    engine.submit(Request("two", (*prompt(10), *engine.take("one").tokens, 7), 2))
    engine.run(SECONDS)
    assert 16 == engine.take("two").cached


def test_a_cache_that_is_reset_knows_nothing():
    engine, tokens = alone(SHAPE, EngineOptions(page_tokens=4)), prompt(20)
    for name in ("one", "two"):
        engine.submit(Request(name, tokens))
        engine.run(SECONDS)
        engine.reset()
    assert (0, 128) == (engine.take("two").cached, engine.pool.free)


# -- room


def test_a_request_makes_room_for_one_that_came_before_it_and_is_none_the_worse():
    engine = alone(SHAPE, EngineOptions(blocks=9, page_tokens=4, chunk=16))
    prompts = [prompt(14, 1), prompt(15, 2)]
    for number, tokens in enumerate(prompts):
        engine.submit(Request(f"q{number}", tokens, 16))
    engine.run(SECONDS)
    first, second = engine.take("q0"), engine.take("q1")
    assert (0, True) == (first.preempted, second.preempted > 0)
    assert [MODEL.continued(tokens, 16) for tokens in prompts] == [first.tokens, second.tokens]
    assert 9 == engine.pool.free


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_a_request_that_is_given_up_gives_its_blocks_back(steps):
    engine = alone(SHAPE, EngineOptions(page_tokens=4, chunk=8))
    engine.submit(Request("gone", prompt(20), 30))
    engine.submit(Request("stays", prompt(11, 2), 5))
    for _ in range(steps):
        engine.step()
    engine.cancel("gone")
    engine.run(SECONDS)
    gone = engine.take("gone")
    assert gone.aborted and gone.tokens == MODEL.continued(prompt(20), 30)[: len(gone.tokens)]
    assert MODEL.continued(prompt(11, 2), 5) == engine.take("stays").tokens
    assert 128 == engine.pool.free


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (Request("known", (1,)), "one of that name"),
        (Request("none", ()), "has 0 tokens"),
        (Request("nothing", (1,), 0), "wants 0"),
        (Request("long", (1,) * 2040, 9), "the cache has 2048"),
        (Request("foreign", (1, 256)), "not below 256"),
        (Request("foreign", (1, -1)), "not below 256"),
    ],
)
def test_a_request_that_cannot_be_computed_is_refused(request_, word):
    engine = alone(SHAPE)
    engine.submit(Request("known", (1,)))
    with pytest.raises(OptionsInvalid, match=word):
        engine.submit(request_)


@pytest.mark.parametrize(
    ("shape", "ranks"), [(SHAPE, 3), (SHAPE, 16), (ModelShape(heads=6, kv_heads=4), 1)], ids=["3", "16", "6-over-4"]
)
def test_heads_that_cannot_be_shared_are_refused(shape, ranks):
    with pytest.raises(LayoutInvalid, match="shared equally"):
        Shard(shape, 0, ranks)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30))
def test_a_pool_loses_no_block_and_gives_none_twice(seed):
    rng, pool, held = random.Random(seed), BlockPool(12), []
    for number in range(60):
        if held and rng.random() < 0.45:
            pool.give(held.pop(rng.randrange(len(held))))
        elif rng.random() < 0.3 and (hits := pool.find([b"%d" % rng.randrange(20)])):
            pool.hold(hits)
            held.append(hits)
        elif (fresh := pool.take(rng.randrange(4))) is not None:
            assert not {block for blocks in held for block in blocks} & set(fresh)
            held.append(fresh)
            for block in fresh[:2]:
                pool.name(block, b"%d" % (number % 20))
        used = {block for blocks in held for block in blocks}
        assert 12 - len(used) == pool.free
    for blocks in held:
        pool.give(blocks)
    assert 12 == pool.free == len(set(pool.take(12)))
    with pytest.raises(LayoutInvalid, match="Nobody uses it"):
        pool.give([0, 0])
