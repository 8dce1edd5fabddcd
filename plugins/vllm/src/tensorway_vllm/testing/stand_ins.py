"""What stands in for engines that fail, in front of which a real router runs: real engines do not fail on demand.

May import aiohttp, the core and the router. Everything is in one event loop: `play` runs a scene and ends it in time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import aiohttp
from aiohttp import web

from tensorway_vllm.router.app import Router
from tensorway_vllm.router.options import RouterOptions, options_of

#: Seconds for all of a scene; no scene comes near them unless something hangs.
_SCENE: Final = 60.0
EVENTS: Final = (b'data: {"text": "one"}\n\n', b'data: {"text": "two"}\n\n', b"data: [DONE]\n\n")
TICKET: Final = {"body": "opaque", "seal": "0"}
#: Quick, because nothing here computes.
_QUICK: Final = {"health_seconds": 0.1, "health_deadline": 2.0, "health_backoff": 0.4, "drain_seconds": 5.0}

Behaviour = Callable[["Engine", web.BaseRequest, Any], Awaitable[web.StreamResponse]]
Scene = Callable[["Stage"], Awaitable[None]]


class Engine:
    """Answers as vLLM does, or as `behave` does in its place."""

    def __init__(self, behave: Behaviour | None = None) -> None:
        self._behave = behave or answer
        #: Bodies that came, and their headers.
        self.bodies: list[Any] = []
        self.headers: list[Any] = []
        self.paths: list[str] = []
        #: Requests whose client went away.
        self.cancelled = 0
        self.health = 200
        self.url = ""
        self._runner: Any = None

    async def start(self, port: int = 0) -> None:
        """Listen."""
        server = web.Server(self._handle, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        host, bound = self._runner.addresses[0]
        self.url = f"http://{host}:{bound}"

    async def stop(self) -> None:
        """Listen no more, and break all connections off."""
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/health":
            if not self.health:
                await asyncio.sleep(_SCENE)
            return web.Response(status=self.health)
        self.paths.append(request.raw_path)
        self.headers.append(request.headers.copy())
        try:
            raw = b"".join([part async for part in request.content.iter_any()])
            body = json.loads(raw) if raw else None
            self.bodies.append(body)
            return await self._behave(self, request, body)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def answer(engine: Engine, request: web.BaseRequest, body: Any) -> web.StreamResponse:
    """As an engine that is well."""
    if request.method == "GET":
        return web.json_response({"path": request.raw_path})
    if (body.get("kv_transfer_params") or {}).get("hand_over"):
        return web.json_response({"choices": [], "kv_transfer_params": {"tensorway": TICKET}})
    if body.get("stream"):
        return await events(request, EVENTS)
    return web.json_response({"answer": engine.url})


async def events(request: web.BaseRequest, parts: Sequence[bytes], pause: float = 0.01) -> web.StreamResponse:
    """A stream of these pieces."""
    sent = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await sent.prepare(request)
    for part in parts:
        await sent.write(part)
        await asyncio.sleep(pause)
    return sent


def cut(request: web.BaseRequest) -> None:
    """Break the connection off, as the kernel does for a process that was killed."""
    assert request.transport is not None
    request.transport.abort()


def hanging(seconds: float = _SCENE) -> Behaviour:
    """Takes so long, and is well otherwise."""

    async def behave(engine: Engine, request: web.BaseRequest, body: Any) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await answer(engine, request, body)

    return behave


def saying(status: int, text: bytes, kind: str = "application/json") -> Behaviour:
    """Answers with these words."""

    async def behave(engine: Engine, request: web.BaseRequest, body: Any) -> web.StreamResponse:
        return web.Response(status=status, body=text, headers={"Content-Type": kind})

    return behave


async def broken_off(engine: Engine, request: web.BaseRequest, body: Any) -> web.StreamResponse:
    """Ends its connection without a word."""
    cut(request)
    return web.Response()


def breaking_after(*parts: bytes, kind: str = "text/event-stream") -> Behaviour:
    """Says so much, and ends its connection."""

    async def behave(engine: Engine, request: web.BaseRequest, body: Any) -> web.StreamResponse:
        sent = web.StreamResponse(headers={"Content-Type": kind})
        await sent.prepare(request)
        for part in parts:
            await sent.write(part)
            await asyncio.sleep(0.05)
        cut(request)
        return sent

    return behave


class Stage:
    """A router, its engines, and a client."""

    def __init__(self, prefill: Sequence[Engine], decode: Sequence[Engine], options: RouterOptions) -> None:
        self.prefill, self.decode = prefill, decode
        self.router = Router(options)
        self.client: Any = None
        self.url = ""

    async def post(self, path: str = "/v1/completions", body: Any = None, **more: Any) -> tuple[int, Any]:
        """Status, and what was said: JSON, or the bytes of a stream."""
        given = {"json": {"prompt": [1, 2, 3], **(body or {})}} if "data" not in more else {}
        async with self.client.post(f"{self.url}{path}", **given, **more) as said:
            raw = await said.read()
            return said.status, json.loads(raw) if said.content_type == "application/json" else raw

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text."""
        async with self.client.get(f"{self.url}{path}") as said:
            return said.status, await said.text()

    async def counted(self, name: str, **labels: str) -> float:
        """What the router's metrics say."""
        _, text = await self.get("/metrics")
        found = 0.0
        for line in text.splitlines():
            known, _, value = line.rpartition(" ")
            if known.partition("{")[0] == f"tensorway_router_{name}" and all(
                f'{key}="{each}"' in known for key, each in labels.items()
            ):
                found += float(value)
        return found

    async def until(self, holds: Callable[[], Any], seconds: float = 20.0) -> None:
        """Wait until this holds, which may be to be awaited."""

        async def asked() -> None:
            while not (await said if asyncio.iscoroutine(said := holds()) else said):
                await asyncio.sleep(0.02)

        await asyncio.wait_for(asked(), seconds)


def play(scene: Scene, prefill: Sequence[Engine] = (), decode: Sequence[Engine] = (), **options: Any) -> None:
    """Start engines, a router and a client, and run the scene."""

    async def all_of_it() -> None:
        engines = [*prefill, *decode]
        for engine in engines:
            if not engine.url:  # else nobody listens there
                await engine.start()
        urls = {"prefill": [each.url for each in prefill], "decode": [each.url for each in decode]}
        stage = Stage(prefill, decode, options_of({**urls, "port": 0, **_QUICK, **options}))
        try:
            stage.url = await stage.router.start()
            async with aiohttp.ClientSession() as stage.client:
                await scene(stage)
        finally:
            await stage.router.close()
            for engine in engines:
                if engine._runner is not None:
                    await engine.stop()

    asyncio.run(asyncio.wait_for(all_of_it(), _SCENE))
