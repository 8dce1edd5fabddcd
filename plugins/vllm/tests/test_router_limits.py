"""What the router takes from clients and passes on, how much at once, whom it asks, and how it ends. Needs aiohttp."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging

import pytest

pytest.importorskip("aiohttp", reason='needs aiohttp: pip install "tensorway-vllm[router]"')

from tensorway.metrics import Counters
from tensorway.testing.servers import free_port
from tensorway_vllm.router import headers
from tensorway_vllm.router.engines import Engines
from tensorway_vllm.router.options import options_of
from tensorway_vllm.router.vocabulary import METRICS
from tensorway_vllm.testing.stand_ins import EVENTS, Engine, answer, broken_off, events, hanging, play

TEXT = {"Content-Type": "application/json"}


async def raw(stage, text):
    """What is answered to bytes that no client of ours would send."""
    host, port = stage.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(text)
    said = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return said


@pytest.mark.parametrize(
    "body",
    [
        {"kv_transfer_params": {"tensorway": {"body": "of mine"}}},
        {"kv_transfer_params": {}},
        {"kv_transfer_params": {"do_remote_prefill": True}},
        {"kv_transfer_params": 1},
        {"ec_transfer_params": {"a": 1}},
        {"vllm_xargs": {"kv_transfer_params": "x"}},
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_tickets_of_clients_are_refused(body, path):
    async def scene(stage):
        status, said = await stage.post(path, body)
        assert (status, said["error"]["code"]) == (400, 400)
        assert "not taken from clients" in said["error"]["message"]
        assert not stage.decode[0].paths
        assert not stage.prefill[0].paths
        assert 1 == await stage.counted("refused_total", cause="ticket")

    play(scene, [Engine()], [Engine()])


def test_a_ticket_that_is_null_is_none():
    async def scene(stage):
        assert (await stage.post(body={"kv_transfer_params": None}))[0] == 200

    play(scene, [], [Engine()])


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"1", b'"text"', b"\xff", b'{"a": NaN}', b"[" * 200_000, b'{"a":' * 200_000],
)
def test_what_is_no_json_object_is_refused_and_no_engine_hears_of_it(body):
    async def scene(stage):
        status, said = await stage.post(data=body, headers=TEXT)
        assert (status, said["error"]["type"]) == (400, "BadRequestError")
        assert not stage.decode[0].paths
        assert 1 == await stage.counted("refused_total", cause="invalid")

    play(scene, [], [Engine()])


def test_a_name_that_comes_twice_means_what_was_checked():
    twice = b'{"prompt": "a", "kv_transfer_params": {"tensorway": {}}, "kv_transfer_params": null}'

    async def scene(stage):
        assert (await stage.post(data=twice, headers=TEXT))[0] == 200
        assert stage.decode[0].bodies == [{"prompt": "a"}]

    play(scene, [], [Engine()])


@pytest.mark.parametrize("chunked", [True, False])
def test_bodies_that_are_too_long_are_refused(chunked):
    async def parts():
        for _ in range(4):
            yield b'{"a": "' + b"x" * 1000

    async def scene(stage):
        status, said = await stage.post(data=parts() if chunked else b"x" * 4000, headers=TEXT)
        assert (status, said["error"]["message"]) == (413, "The body has more than 2,000 bytes.")
        assert not stage.decode[0].paths

    play(scene, [], [Engine()], body_bytes=2000)


def test_a_compressed_body_is_refused_before_it_grows():
    async def scene(stage):
        bomb = gzip.compress(b" " * (64 << 20))
        assert 415 == (await stage.post(data=bomb, headers={**TEXT, "Content-Encoding": "gzip"}))[0]

    play(scene, [], [Engine()])


def test_a_client_that_does_not_send_its_body_is_not_waited_for():
    async def scene(stage):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"
        assert (await raw(stage, head)).startswith(b"HTTP/1.1 408 ")
        assert 0 == await stage.counted("requests_running")

    play(scene, [], [Engine()], client_seconds=0.2)


@pytest.mark.parametrize(
    "rest",
    [
        b"Transfer-Encoding: chunked\r\n\r\nhunter2\r\n",
        b"Authorization: Bearer hunter2\x01\r\n\r\n",
        b"Authorization : Bearer hunter2\r\n\r\n",
        b"Authorization: Bearer hunter2" + b"x" * 10_000 + b"\r\n\r\n",
        b"Content-Length: hunter2\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_not_logged(rest, caplog):
    async def scene(stage):
        said = await raw(stage, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + rest)
        assert said.split(b" ")[1] == b"400"
        assert not stage.decode[0].paths
        assert (await stage.post())[0] == 200

    caplog.set_level(logging.DEBUG)

    play(scene, [], [Engine()])
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/health", 405),
        ("POST", "/v1/load_lora_adapter", 404),
        ("POST", "/reset_prefix_cache", 404),
        ("POST", "/v1/chat%2fcompletions", 404),
        ("POST", "//v1/completions", 404),
        ("GET", "/v1/models/../../metrics", 404),
        ("GET", "/v1/models/%2e%2e/%2e%2e/metrics", 404),
        ("GET", "http://elsewhere/v1/models", 404),
    ],
)
def test_only_what_is_known_is_passed_on(method, path, status):
    async def scene(stage):
        text = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        said = await raw(stage, text.encode())
        assert said.startswith(f"HTTP/1.1 {status} ".encode())
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == status
        assert not stage.decode[0].paths

    play(scene, [], [Engine()])


def test_credentials_reach_both_engines_and_no_log(caplog):
    caplog.set_level(logging.DEBUG)

    async def scene(stage):
        await stage.post(headers={"Authorization": "Bearer hunter2", "X-Request-Id": "mine-7"})
        await stage.post(data=b"{", headers={"Authorization": "Bearer hunter2"})
        for engine in (stage.prefill[0], stage.decode[0], stage.decode[1]):
            assert engine.headers[0]["Authorization"] == "Bearer hunter2"
            assert engine.headers[0]["X-Request-Id"] == "mine-7"
        _, metrics = await stage.get("/metrics")
        assert "hunter2" not in caplog.text + metrics
        assert "mine-7" in caplog.text

    play(scene, [Engine()], [Engine(broken_off), Engine()])


def test_headers_of_one_connection_end_with_it_and_those_of_proxies_are_added_to():
    async def scene(stage):
        given = {
            "Connection": "keep-alive, X-Once",
            "X-Once": "1",
            "TE": "trailers",
            "Upgrade": "h2c",
            "Proxy-Authorization": "Basic x",
            "X-Forwarded-For": "203.0.113.7",
            "X-Data-Parallel-Rank": "3",
            "X-Session-Id": "s",
        }
        await stage.post(headers=given)
        heard = stage.decode[0].headers[0]
        for name in ("X-Once", "TE", "Upgrade", "Proxy-Authorization", "X-Data-Parallel-Rank"):
            assert name not in heard
        assert heard["X-Session-Id"] == "s"
        assert heard["X-Forwarded-For"] == "203.0.113.7, 127.0.0.1"
        assert heard["Accept-Encoding"] == "identity"
        assert heard.getall("Host") == [stage.decode[0].url.removeprefix("http://")]

    play(scene, [], [Engine()])


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", "a\tb", "é"])
def test_a_request_without_an_id_that_can_be_logged_gets_one(given):
    made = headers.request_id(given)
    assert len(made) == 32
    assert made != headers.request_id(given)


def test_the_id_comes_back_and_headers_that_are_no_text_are_left_out():
    async def scene(stage):
        async with stage.client.get(f"{stage.url}/v1/models", headers={"X-Request-Id": "a-1"}) as said:
            assert said.headers.getall("X-Request-Id") == ["a-1"]
        said = await raw(stage, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Odd: \xff\r\nConnection: close\r\n\r\n")
        assert said.startswith(b"HTTP/1.1 200 ")
        assert "X-Odd" not in stage.decode[0].headers[1]

    play(scene, [], [Engine()])


def test_more_requests_than_are_allowed_are_refused_and_may_come_again():
    gate = {}

    async def waiting(engine, request, body):
        await gate["open"].wait()
        return await answer(engine, request, body)

    async def scene(stage):
        gate["open"] = asyncio.Event()
        first = [asyncio.ensure_future(stage.post()) for _ in range(2)]
        await stage.until(lambda: len(stage.decode[0].bodies) == 2)
        async with stage.client.post(f"{stage.url}/v1/completions", json={}) as said:
            assert (said.status, said.headers["Retry-After"]) == (503, "1")
        assert (await stage.get("/health"))[0] == 200
        gate["open"].set()
        assert [200, 200] == [status for status, _ in await asyncio.gather(*first)]
        assert (await stage.post())[0] == 200
        assert 1 == await stage.counted("refused_total", cause="busy")

    play(scene, [], [Engine(waiting)], most=2)


def test_who_drains_ends_what_is_here_and_takes_nothing_new():
    async def slowly(engine, request, body):
        return await events(request, EVENTS, 0.3)

    async def scene(stage):
        going = asyncio.ensure_future(stage.post(body={"stream": True}))
        await stage.until(lambda: stage.decode[0].bodies)
        draining = asyncio.ensure_future(stage.router.drain())
        await asyncio.sleep(0.05)
        status, said = await stage.get("/health")
        assert (status, json.loads(said)["status"]) == (503, "draining")
        assert (await stage.post())[0] == 503
        assert await going == (200, b"".join(EVENTS))
        assert 0 == await draining

    play(scene, [], [Engine(slowly)])


def test_who_drains_does_not_wait_longer_than_it_was_told():
    async def scene(stage):
        going = asyncio.ensure_future(stage.post())
        await stage.until(lambda: stage.decode[0].bodies)
        assert 1 == await stage.router.drain()
        going.cancel()

    play(scene, [], [Engine(hanging())], drain_seconds=0.2)


def test_an_engine_that_is_down_is_left_alone_and_taken_back():
    async def scene(stage):
        engine = stage.decode[0]
        port = int(engine.url.rpartition(":")[2])
        await engine.stop()
        await stage.until(lambda: known(stage, 503))
        assert "nobody listens" in (await stage.get("/health"))[1]
        status, said = await stage.post()
        assert (status, said["error"]["type"]) == (503, "ServiceUnavailable")
        assert "nobody listens" in said["error"]["message"]
        await engine.start(port)
        await stage.until(lambda: known(stage, 200))
        assert (await stage.post())[0] == 200
        assert 1 == await stage.counted("ejections_total", role="decode")

    async def known(stage, status):
        return (await stage.get("/health"))[0] == status

    play(scene, [], [Engine()])


def test_an_engine_whose_own_engine_is_dead_is_left_alone_at_once():
    async def scene(stage):
        stage.decode[0].health = 503
        await stage.until(lambda: down(stage))
        for _ in range(4):
            assert (await stage.post())[1] == {"answer": stage.decode[1].url}
        assert 0 == await stage.counted("retries_total")

    async def down(stage):
        return 0 == await stage.counted("engine_up", engine=stage.decode[0].url.removeprefix("http://"))

    play(scene, [], [Engine(), Engine()], health_failures=100, health_seconds=0.5)


def test_a_request_of_which_nothing_was_heard_leaves_an_engine_that_goes_down():
    async def stopped(engine, request, body):
        engine.health = 0  # a process that is stopped takes connections, and answers nothing
        await asyncio.sleep(50)

    async def scene(stage):
        assert (await stage.post()) == (200, {"answer": stage.decode[1].url})
        assert 1 == await stage.counted("retries_total", cause="out")
        assert 1 == stage.decode[0].cancelled

    play(scene, [], [Engine(stopped), Engine()], health_deadline=0.5)


def test_errors_that_an_engine_answers_with_do_not_take_it_out():
    async def failing(engine, request, body):
        from aiohttp import web

        return web.json_response({}, status=500) if "poison" in body else await answer(engine, request, body)

    async def scene(stage):
        for _ in range(5):
            assert (await stage.post(body={"poison": 1}))[0] == 500
        assert (await stage.post())[0] == 200
        assert 0 == await stage.counted("ejections_total")

    play(scene, [], [Engine(failing)], health_failures=2)


def test_an_engine_that_starts_later_than_the_router_is_found():
    async def scene(stage):
        assert (await stage.get("/health"))[0] == 503
        await stage.decode[0].start(port)
        await stage.until(lambda: ready(stage))

    async def ready(stage):
        return (await stage.get("/health"))[0] == 200

    late, port = Engine(), free_port()
    late.url = f"http://127.0.0.1:{port}"
    play(scene, [], [late])


def engines(choice, count):
    urls = [f"http://host-{place}:8000" for place in range(count)]
    made = Engines(options_of({"decode": urls, "choice": choice}), Counters(METRICS))
    for engine in made:
        engine.healthy()
    return made


def test_the_one_with_the_fewest_requests_is_chosen_and_equal_ones_take_turns():
    async def scene():
        made = engines("least-loaded", 3)
        with made.decode[0], made.decode[0], made.decode[1]:
            assert made.choose("decode") is made.decode[2]
            with made.decode[2]:
                assert {made.choose("decode").name for _ in range(2)} == {"host-1:8000", "host-2:8000"}
        assert made.choose("decode") is made.decode[0]
        assert made.choose("prefill") is None

    asyncio.run(scene())


def test_one_after_the_other_is_chosen_whatever_they_have():
    async def scene():
        made = engines("round-robin", 3)
        with made.decode[0]:
            assert [made.choose("decode").name[5] for _ in range(6)] == [*"012012"]
        assert made.choose("decode", tried=made.decode[:2]) is made.decode[2]

    asyncio.run(scene())


def test_an_engine_that_fails_quickly_is_not_given_everything():
    async def scene():
        made = engines("least-loaded", 2)
        made.decode[0].failed("status")
        with made.decode[1]:
            assert made.choose("decode") is made.decode[1]
            made.decode[0].served()
            assert made.choose("decode") is made.decode[0]

    asyncio.run(scene())


def test_an_engine_that_stays_down_is_asked_less_and_less_often():
    async def scene():
        [engine] = engines("least-loaded", 1)
        pauses = []
        for _ in range(8):
            engine.ill("down", at_once=True)
            pauses.append(engine.pause)
        assert pauses == sorted(pauses)
        assert (pauses[0], pauses[-1]) == (1.0, 10.0)
        engine.healthy()
        assert engine.pause == 2.0

    asyncio.run(scene())
