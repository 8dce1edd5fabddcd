"""Engines that are killed, stopped, shouted at and lied to, between two steps of a hand-over and within one.

After each, whoever is left has no request and no block in use, and says what an engine says that computes everything.
"""

from __future__ import annotations

import importlib.util
import random
import socket
import time

import pytest

from tensorway.errors import PeerLost

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.timeout(1200),
    pytest.mark.long,
]
SEEDS = iter(range(1000, 2000))
#: Seconds of the deployment's leases and deadlines, and somewhat more.
LEASE = 10.0


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    from tensorway_vllm.testing.deployment import Deployment

    made = Deployment(tmp_path_factory.mktemp("deployment"))
    yield made
    made.close()


@pytest.fixture
def pair(deployment):
    return list(deployment.engines("prefill", "decode"))


@pytest.fixture
def computed(pair):
    """A new prompt whose blocks the first engine keeps, and the ticket."""

    def new(tokens=300):
        from tensorway_vllm.testing.deployment import HAND_OVER, prompt_of

        prompt = prompt_of(next(SEEDS), tokens)
        return prompt, pair[0].ask(prompt, 1, HAND_OVER).params

    return new


def hits_of(served, prompt, params, expected):
    """Ask, compare, and say how many tokens were loaded.

    A load that an engine was promised, and that failed, is a hit for vLLM: whose ticket it is may be known only then.
    """
    before = served.state()
    assert served.ask(prompt, len(expected), params).tokens == expected
    after = served.state()
    return after["hits"] - before["hits"] if after["loaded"] > before["loaded"] else 0


def works(deployment, computed, decode="decode"):
    """A hand-over as if nothing had been, and nothing is left of it."""
    served = deployment.engine(decode)  # which takes longer to start than a ticket is good for
    prompt, params = computed()
    assert hits_of(served, prompt, params, deployment.alone(prompt, 8, decode)) == len(prompt) - 1
    deployment.at_rest("prefill")
    deployment.at_rest(decode)


@pytest.mark.parametrize("moment", ["loading", "decoding"])
def test_a_consumer_is_killed_and_another_answers(deployment, pair, computed, moment):
    prompt, params = computed()
    expected = deployment.alone(prompt, 8, "decode")
    name = pair[1].begin(prompt, 400, params)
    if moment == "decoding":
        pair[1].began(name)
    pair[1].kill()
    assert deployment.engine("decode").ask(prompt, 8, params).tokens == expected
    deployment.at_rest("prefill")
    deployment.at_rest("decode")
    works(deployment, computed)


def test_a_producer_is_killed_after_its_blocks_were_read_and_comes_back(deployment, pair, computed):
    (prompt, params), (other, unused) = computed(), computed()
    expected = [deployment.alone(each, 64, "decode") for each in (prompt, other)]
    name = pair[1].begin(prompt, 64, params)
    pair[1].began(name)
    pair[0].kill()
    assert pair[1].answer(name).tokens == expected[0]
    pair[0] = deployment.engine("prefill")  # what `computed` asks from now on
    assert hits_of(pair[1], other, unused, expected[1]) == 0, "a ticket of another life was honored"
    deployment.at_rest("decode")
    works(deployment, computed)


def test_a_producer_stands_still_for_longer_than_any_deadline(deployment, pair, computed):
    prompt, params = computed()
    expected = deployment.alone(prompt, 8, "decode")
    pair[0].stop()
    assert pair[1].ask(prompt, 8, params).tokens == expected
    deployment.at_rest("decode")
    time.sleep(LEASE)
    pair[0].resume()
    deployment.at_rest("prefill")
    works(deployment, computed)


@pytest.mark.parametrize("after", [0.0, 0.005, 0.02, 0.1])
def test_a_consumer_stands_still_until_the_blocks_are_others(deployment, pair, computed, after):
    prompt, params = computed()
    expected = deployment.alone(prompt, 8, "decode")
    name = pair[1].begin(prompt, 8, params)
    time.sleep(after)
    pair[1].stop()
    deployment.at_rest("prefill")
    for _ in range(4):  # other tokens are in these blocks now
        from tensorway_vllm.testing.deployment import prompt_of

        pair[0].ask(prompt_of(next(SEEDS), 900), 1)
    pair[1].resume()
    assert pair[1].answer(name).tokens == expected
    deployment.at_rest("decode")
    works(deployment, computed)


def test_noise_and_foreign_words_at_every_door(deployment, pair, computed):
    from tensorway_vllm.testing.deployment import listening, shout

    foreign = [
        b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n",
        b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL" + bytes(48),
        b"\x92\xacget_meta_msg\0",
        bytes(70_000),
    ]
    for served in pair:
        doors = listening(served.pid)
        assert doors, "an engine that is found listens somewhere"
        assert shout(doors, random.Random(served.pid), *foreign)
    port = int(deployment.address.rpartition(":")[2])
    assert shout([(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", port))], random.Random(1), *foreign)
    works(deployment, computed)


def test_tickets_that_are_none(deployment, pair, computed):
    from tensorway_vllm.testing.deployment import HAND_OVER

    prompt, params = computed()
    expected = deployment.alone(prompt, 8, "decode")
    good = params["tensorway"]
    wrong = [
        {},
        None,
        [],
        {**good, "body": good["body"][:-20]},
        {**good, "body": good["body"].replace('"tokens":', '"tokens":9')},
        {**good, "body": "[" * 100_000},
        {**good, "length": 1 << 30},
        {**good, "prompt_tokens": -1},
        {**good, "prompt_tokens": 1 << 62},
        {**good, "prompt_tokens": "many"},
        {**good, "seal": "\ud800" * 64},
        dict.fromkeys(good),
        {"tensorway_kv": 99, "body": "", "length": 0, "seal": ""},
    ]
    for each in wrong:
        assert hits_of(pair[1], prompt, {"tensorway": each, "hand_over": 7}, expected) == 0
        pair[1].forget()
    assert hits_of(pair[1], prompt, params, expected) == len(prompt) - 1
    pair[1].forget()
    assert hits_of(pair[1], prompt, params, expected) == 0, "a ticket was good twice"
    pair[1].forget()
    # To who made it; and when it is too late.
    other, late = computed()
    assert pair[0].ask(other, 8, late).tokens == deployment.alone(other, 8, "decode")
    deployment.at_rest("prefill")
    time.sleep(LEASE)
    assert hits_of(pair[1], other, late, deployment.alone(other, 8, "decode")) == 0
    # A client that hangs up at the producer.
    pair[0].abort(pair[0].begin(prompt, 64, HAND_OVER))
    works(deployment, computed)


def test_the_rendezvous_is_lost_and_comes_back(deployment, pair, computed):
    works(deployment, computed)
    deployment.lose_meeting()
    time.sleep(LEASE)
    works(deployment, computed)  # what is connected stays connected
    prompt, params = computed()
    deployment.meet_again()
    time.sleep(LEASE)
    works(deployment, computed, "newcomer")
    assert pair[1].ask(prompt, 8, params).tokens == deployment.alone(prompt, 8, "decode")
    deployment.at_rest("decode")
    deployment.engine("newcomer").close()


@pytest.mark.parametrize("what", ["revision", "block", "dtype", "model", "secret"])
def test_an_engine_that_is_another_computes(deployment, pair, computed, what, tmp_path):
    from tensorway_vllm.testing.tiny import make

    how = {
        "revision": {"extra": {"facts": {"revision": "another"}}},
        "block": {"block_size": 64},
        "dtype": {"dtype": "bfloat16"},
        "model": {"model": str(make(tmp_path / "other", seed=7))} if what == "model" else {},
        "secret": {"extra": {"options": {"secret": "another secret of sixteen"}}},
    }[what]
    prompt, params = computed()
    stranger = deployment.engine(f"stranger-{what}", **how)
    try:
        loaded = hits_of(stranger, prompt, params, stranger.ask(prompt, 8).tokens)
        assert loaded == 0
        stranger.forget()
        again, handed = computed()
        alone = stranger.ask(again, 8).tokens
        stranger.forget()
        assert stranger.ask(again, 8, handed).tokens == alone
        deployment.at_rest(f"stranger-{what}")
    finally:
        stranger.close()
    works(deployment, computed)


def test_an_engine_whose_port_is_taken_says_so_and_computes(deployment, pair):
    from tensorway_vllm.testing.deployment import prompt_of

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = {"secret": deployment.secret, "port": port}
        served = deployment.engine("alone", extra={"rendezvous_options": options, "start_seconds": 1.0})
        try:
            prompt = prompt_of(next(SEEDS))
            assert served.ask(prompt, 8).tokens == deployment.alone(prompt, 8, "decode")
            deployment.at_rest("alone")
            assert str(port) in served.log
        finally:
            served.close()


def test_an_engine_with_another_secret_ends_its_start_with_the_reason(deployment):
    options = {"address": deployment.address, "secret": "not the one that it is"}
    served = deployment.start("stranger", extra={"rendezvous_options": options})
    with pytest.raises(PeerLost) as told:
        served.ready()
    assert "secret" in told.value.true, told.value.true
