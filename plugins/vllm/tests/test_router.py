"""What the router does with engines that fail: the client has an answer, or an error that says why. Needs aiohttp."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("aiohttp", reason='needs aiohttp: pip install "tensorway-vllm[router]"')

import aiohttp
from aiohttp import web

from tensorway_vllm.testing import servers
from tensorway_vllm.testing.stand_ins import (
    EVENTS,
    TICKET,
    Engine,
    answer,
    breaking_after,
    broken_off,
    events,
    hanging,
    play,
    saying,
)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WELL = b"".join(EVENTS)


def nobody():
    """Where nobody listens."""
    engine = Engine()
    engine.url = f"http://127.0.0.1:{servers.free_port()}"
    return engine


def test_the_prompt_goes_to_one_engine_and_its_ticket_with_the_request_to_another():
    asked = {"model": "m", "prompt": "a b", "max_tokens": 7, "temperature": 0.0, "stop": ["x"], "seed": 2**53}

    async def scene(stage):
        status, said = await stage.post(body=asked)
        assert (status, said) == (200, {"answer": stage.decode[0].url})
        assert stage.prefill[0].bodies == [
            {**asked, "stream": False, "max_tokens": 1, "kv_transfer_params": {"hand_over": True}}
        ]
        assert stage.decode[0].bodies == [{**asked, "kv_transfer_params": {"tensorway": TICKET}}]
        assert 1 == await stage.counted("handed_over_total", result="ticket")

    play(scene, [Engine()], [Engine()])


def test_of_a_chat_one_token_is_prefilled_and_nothing_is_streamed_there():
    asked = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 9,
        "min_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [{"type": "function"}],
    }

    async def scene(stage):
        status, said = await stage.post(CHAT, asked)
        assert (status, said) == (200, WELL)
        assert stage.prefill[0].bodies == [
            {
                "messages": asked["messages"],
                "tools": asked["tools"],
                "prompt": [1, 2, 3],
                "stream": False,
                "max_tokens": 1,
                "max_completion_tokens": 1,
                "kv_transfer_params": {"hand_over": True},
            }
        ]
        assert stage.decode[0].bodies[0].items() >= asked.items()

    play(scene, [Engine()], [Engine()])


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"prompt": ["a", "b"]}, "several"),
        ({"prompt": [[1, 2], [3]]}, "several"),
        ({"n": 2}, "several"),
        ({"echo": True}, "whole"),
        ({"prompt_logprobs": 0}, "whole"),
    ],
)
def test_what_one_ticket_cannot_serve_is_not_handed_over(asked, why):
    async def scene(stage):
        assert (await stage.post(body=asked))[0] == 200
        assert [] == stage.prefill[0].bodies
        assert "kv_transfer_params" not in stage.decode[0].bodies[0]
        assert 1 == await stage.counted("handed_over_total", result=why)

    play(scene, [Engine()], [Engine()])


def test_short_requests_are_not_handed_over():
    async def scene(stage):
        await stage.post(body={"prompt": "a"})
        await stage.post(body={"prompt": "a" * 500})
        assert 1 == len(stage.prefill[0].bodies)
        assert 1 == await stage.counted("handed_over_total", result="short")

    play(scene, [Engine()], [Engine()], hand_over_bytes=400)


def test_one_prompt_in_a_list_is_one_prompt():
    async def scene(stage):
        for prompt in (["a"], [[1, 2]], [1, 2], "a"):
            await stage.post(body={"prompt": prompt, "n": 1})
        assert 4 == await stage.counted("handed_over_total", result="ticket")

    play(scene, [Engine()], [Engine()])


@pytest.mark.parametrize(
    ("behave", "result"),
    [
        (saying(500, b"{}"), "refused"),
        (saying(400, b"{}"), "refused"),
        (saying(429, b"{}"), "refused"),
        (saying(302, b""), "refused"),
        (hanging(), "late"),
        (broken_off, "lost"),
        (breaking_after(b'{"choices', kind="application/json"), "lost"),
        (saying(200, b"{not json"), "garbage"),
        (saying(200, b"[1]"), "garbage"),
        (saying(200, b'{"kv_transfer_params": {"tensorway": "text"}}'), "garbage"),
        (saying(200, b'{"kv_transfer_params": [1]}'), "garbage"),
        (saying(200, b"[" * 100_000), "garbage"),
        (saying(200, b"\xff\xfe"), "garbage"),
        (saying(200, b'{"kv_transfer_params": {"tensorway": {"a": "%s"}}}' % (b"x" * (2 << 20))), "garbage"),
        (saying(200, b'"%s"' % (b"x" * (5 << 20))), "garbage"),
        (saying(200, b'{"kv_transfer_params": null}'), "none"),
        (saying(200, b'{"kv_transfer_params": {"other": {}}}'), "none"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_prefill_that_fails_costs_the_ticket_and_not_the_answer(behave, result, stream):
    async def scene(stage):
        status, said = await stage.post(body={"stream": stream})
        assert status == 200
        assert said == (WELL if stream else {"answer": stage.decode[0].url})
        assert "kv_transfer_params" not in stage.decode[0].bodies[0]
        assert 1 == await stage.counted("handed_over_total", result=result)

    play(scene, [Engine(behave)], [Engine()], prefill_seconds=0.3 if result == "late" else 30.0)


def test_without_a_prefill_engine_that_is_up_decode_computes_the_prompt():
    async def scene(stage):
        assert (await stage.post())[0] == 200
        assert 1 == await stage.counted("handed_over_total", result="down")
        assert 0 == await stage.counted("engine_up", role="prefill")

    play(scene, [nobody()], [Engine()])


def test_another_prefill_engine_is_asked_once_where_one_breaks_down():
    async def scene(stage):
        for _ in range(2):
            await stage.post()
        assert stage.decode[0].bodies[-1]["kv_transfer_params"] == {"tensorway": TICKET}
        assert 2 == await stage.counted("handed_over_total", result="ticket")

    play(scene, [Engine(broken_off), Engine()], [Engine()])


@pytest.mark.parametrize(
    ("behave", "cause", "keeps_the_ticket"),
    [
        (broken_off, "lost", True),
        (breaking_after(), "lost", True),
        (breaking_after(b"data: {"), "lost", True),
        (hanging(), "late", True),
        (saying(200, b"", "text/event-stream"), "lost", True),
        (saying(500, b'{"error": {}}'), "status", False),
        (saying(503, b"not json"), "status", False),
        (saying(200, b'data: {"error": {"code": 500}}\n\ndata: [DONE]\n\n', "text/event-stream"), "error", False),
    ],
)
def test_another_decode_engine_is_asked_while_the_client_has_heard_nothing(behave, cause, keeps_the_ticket):
    async def scene(stage):
        for _ in range(2):  # the second one does not begin with an engine that has just failed
            assert await stage.post(body={"stream": True}) == (200, WELL)
        assert 1 == await stage.counted("retries_total", cause=cause)
        assert 1 == await stage.counted("engine_failures_total", cause=cause, role="decode")
        tickets = ["kv_transfer_params" in body for body in stage.decode[1].bodies]
        assert tickets == [keeps_the_ticket, True]

    first = 2.0 if cause == "late" else 30.0
    play(scene, [Engine()], [Engine(behave), Engine()], first_seconds=first, health_backoff=30.0)


def test_an_answer_that_is_no_stream_is_held_back_until_it_is_whole():
    async def scene(stage):
        for _ in range(2):
            assert await stage.post() == (200, {"answer": stage.decode[1].url})
        assert 1 == await stage.counted("retries_total", cause="lost")

    half = breaking_after(b'{"answer": "', b"half", kind="application/json")
    play(scene, [], [Engine(half), Engine()], health_backoff=30.0)


def test_what_the_client_did_wrong_it_hears_from_the_first_engine():
    text = b'{"error": {"message": "no such model", "code": 404}}'

    async def scene(stage):
        status, said = await stage.post()
        assert (status, said) == (404, json.loads(text))
        assert 1 == len(stage.decode[0].bodies) + len(stage.decode[1].bodies)

    play(scene, [Engine(saying(404, text))], [Engine(saying(404, text)), Engine(saying(404, text))])


def test_when_no_engine_answers_the_client_hears_which_were_tried_and_why():
    async def scene(stage):
        status, said = await stage.post()
        assert status == 502
        assert said["error"]["code"] == 502
        assert all(engine.url.removeprefix("http://") in said["error"]["message"] for engine in stage.decode)
        assert "(lost)" in said["error"]["message"]

    play(scene, [Engine()], [Engine(broken_off), Engine(broken_off)])


def test_when_every_engine_says_that_it_failed_the_client_hears_the_last_ones_words():
    async def scene(stage):
        assert await stage.post() == (500, {"error": {"message": "CUDA"}})
        assert len(stage.decode[0].bodies) == 3
        assert "kv_transfer_params" not in stage.decode[0].bodies[-1]

    play(scene, [Engine()], [Engine(saying(500, b'{"error": {"message": "CUDA"}}'))])


def test_an_engine_that_hangs_is_no_wait_without_an_end():
    async def scene(stage):
        status, said = await stage.post()
        assert status == 504
        assert "(late)" in said["error"]["message"]
        await stage.until(lambda: stage.decode[0].cancelled == 1)

    play(scene, [], [Engine(hanging())], request_seconds=0.5)


def test_an_engine_that_breaks_off_in_the_middle_of_a_stream_leaves_whole_events_and_an_error():
    async def scene(stage):
        status, said = await stage.post(body={"stream": True})
        assert status == 200
        *whole, last, rest = said.split(b"\n\n")
        assert (whole, rest) == ([EVENTS[0].strip(), EVENTS[1].strip()], b"")
        told = json.loads(last.removeprefix(b"data: "))["error"]
        assert told["code"] == 502
        assert "connection broke" in told["message"]
        assert 1 == await stage.counted("broken_total", cause="lost")
        assert 1 == await stage.counted("requests_total", status="200")

    play(scene, [], [Engine(breaking_after(EVENTS[0], EVENTS[1] + b'data: {"text": "ha')), Engine(broken_off)])


def test_an_engine_that_falls_silent_in_the_middle_of_a_stream_is_not_waited_for():
    async def scene(stage):
        status, said = await stage.post(body={"stream": True})
        assert status == 200
        assert said.startswith(EVENTS[0] + b'data: {"error"')
        await stage.until(lambda: stage.decode[0].cancelled == 1)

    async def silent(engine, request, body):
        await events(request, EVENTS[:1], 0.0)
        await asyncio.sleep(50)

    play(scene, [], [Engine(silent)], silence_seconds=0.3)


def test_a_stream_that_takes_longer_than_requests_may_ends_with_an_error_and_no_engine_is_blamed():
    async def endless(engine, request, body):
        return await events(request, EVENTS[:1] * 10_000)

    async def scene(stage):
        status, said = await stage.post(body={"stream": True})
        assert status == 200
        *whole, last, _ = said.split(b"\n\n")
        assert {EVENTS[0].strip()} == set(whole)
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == 504
        await stage.until(lambda: stage.decode[0].cancelled == 1)
        assert 1 == await stage.counted("broken_total", cause="late")
        assert 0 == await stage.counted("engine_failures_total")

    play(scene, [], [Engine(endless)], request_seconds=2.0)


def test_a_long_answer_passes_and_one_that_is_cut_is_seen_to_be():
    size = 3 << 20

    async def long(engine, request, body):
        whole = web.StreamResponse(headers={"Content-Type": "application/json"})
        await whole.prepare(request)
        for _ in range(size >> 16):
            await whole.write(b"x" * (1 << 16))
        if "cut" in body:
            request.transport.abort()
        return whole

    async def scene(stage):
        async with stage.client.post(f"{stage.url}{COMPLETIONS}", json={}) as said:
            assert len(await said.read()) == size
        with pytest.raises(aiohttp.ClientPayloadError):
            async with stage.client.post(f"{stage.url}{COMPLETIONS}", json={"cut": 1}) as said:
                await said.read()

    play(scene, [], [Engine(long)], held_bytes=1 << 20)


def test_events_that_come_in_pieces_and_at_once_come_to_the_client_as_they_were():
    text = b"".join(b'data: {"n": %d}\r\n\r\n' % n for n in range(50)) + b": a comment\n\n" + EVENTS[-1]

    async def pieces(engine, request, body):
        return await events(request, [text[at : at + 7] for at in range(0, len(text), 7)], 0.0)

    async def scene(stage):
        assert await stage.post(body={"stream": True}) == (200, text)

    play(scene, [], [Engine(pieces)])


@pytest.mark.parametrize("where", ["prefill", "decode", "stream"])
def test_a_client_that_goes_away_ends_its_request_at_the_engine(where):
    async def endless(engine, request, body):
        await events(request, [EVENTS[0]] * 10_000)

    async def scene(stage):
        waiting = asyncio.ensure_future(stage.post(body={"stream": True}))
        engine = stage.prefill[0] if where == "prefill" else stage.decode[0]
        await stage.until(lambda: engine.bodies)
        await asyncio.sleep(0.2)
        waiting.cancel()
        await stage.until(lambda: engine.cancelled == 1)
        await stage.until(lambda: gone(stage))
        assert 0 == await stage.counted("requests_running")
        assert 0 == await stage.counted("engine_running")
        assert not stage.decode[1].bodies
        if where == "prefill":
            assert not stage.decode[0].bodies

    async def gone(stage):
        return 1 == await stage.counted("gone_total")

    prefill = Engine(hanging()) if where == "prefill" else Engine()
    play(scene, [prefill], [Engine(endless if where == "stream" else hanging()), Engine()], choice="round-robin")


def test_an_engine_is_held_back_by_a_client_that_does_not_read_and_the_deadline_ends_it():
    sent = 0

    async def endless(engine, request, body):
        nonlocal sent
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        while True:
            await answer.write(b"data: " + b"x" * 65_536 + b"\n\n")
            sent += 65_536

    async def scene(stage):
        host, port = stage.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        body = b'{"stream": true}'
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await stage.until(lambda: sent)
        known = -1
        while known != sent:  # buffers of sockets are filled, and then it stands still
            known = sent
            await asyncio.sleep(0.3)
        assert sent < 64 << 20
        await stage.until(lambda: stage.decode[0].cancelled == 1)
        writer.close()
        assert 1 == await stage.counted("broken_total", cause="late")

    play(scene, [], [Engine(endless)], request_seconds=4.0)


def test_what_is_not_handed_over_is_answered_by_a_decode_engine():
    async def scene(stage):
        for path in ("/v1/models", "/v1/models/org/name", "/version", "/v1/models?a=b%20c"):
            assert await stage.get(path) == (200, json.dumps({"path": path}))
        assert (await stage.post("/tokenize"))[0] == 200
        assert not stage.prefill[0].paths

    play(scene, [Engine()], [Engine()])


def test_the_engine_that_has_fewest_requests_is_asked():
    async def scene(stage):
        slow = [asyncio.ensure_future(stage.post()) for _ in range(2)]
        await stage.until(lambda: sum(len(engine.bodies) for engine in stage.decode) == 2)
        assert [1, 1] == [len(engine.bodies) for engine in stage.decode]
        gate["open"].set()
        await asyncio.gather(*slow)

    async def waiting(engine, request, body):
        gate.setdefault("open", asyncio.Event())
        await gate["open"].wait()
        return await answer(engine, request, body)

    gate = {}
    play(scene, [], [Engine(waiting), Engine(waiting)])
