"""The router as a server: what it answers, how much at once, and how it ends.

May import aiohttp, the core and the modules beside it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final
from urllib.parse import unquote

import aiohttp
import msgspec
from aiohttp import web

from tensorway._logging import logger
from tensorway.errors import AddressInvalid
from tensorway.metrics import Counters, exposition
from tensorway_vllm.router import bodies, headers
from tensorway_vllm.router.bodies import Refused
from tensorway_vllm.router.engines import Engines
from tensorway_vllm.router.health import asked as ask_health
from tensorway_vllm.router.health import watched
from tensorway_vllm.router.options import RouterOptions
from tensorway_vllm.router.relay import Asked, Relay, Unanswered
from tensorway_vllm.router.vocabulary import METRICS

_log = logger("vllm.router")
_http = logger("vllm.router.http")
#: Handed over; and what any decode engine answers alone. All else, such as what resets an engine, is not passed on.
_HANDED_OVER: Final = ("/v1/completions", "/v1/chat/completions")
_ALONE: Final = {"/v1/models": "GET", "/version": "GET", "/tokenize": "POST", "/detokenize": "POST"}
_OWN: Final = ("/health", "/metrics")
_ONE_MODEL: Final = "/v1/models/"
#: Seconds that a connection may idle, and that connections are given when all requests have ended.
_IDLE, _LAST = 75.0, 1.0
#: For which a connection to an engine is kept: less than vLLM keeps it, or it would be used as it is closed.
_KEPT: Final = 3.0
_KINDS: Final = {400: "BadRequestError", 404: "NotFoundError", 405: "MethodNotAllowed", 503: "ServiceUnavailable"}


def _without_what_was_sent(record: logging.LogRecord) -> bool:
    """What is no HTTP may hold credentials, and aiohttp's exceptions quote it."""
    record.exc_info = record.exc_text = None
    return True


_http.addFilter(_without_what_was_sent)


class Router:
    """Everything that belongs to one router. Use it in one event loop: `start`, then `drain`, then `close`."""

    def __init__(self, options: RouterOptions) -> None:
        self._options = options
        self._counts = Counters(METRICS)
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._engines = Engines(options, self._counts)
        self._watching: list[asyncio.Task[None]] = []
        self._counts.set("router_requests_running", 0)

    async def start(self) -> str:
        """Ask all engines how they are, then listen; returns the URL."""
        connect = aiohttp.ClientTimeout(total=None, sock_connect=self._options.connect_seconds)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT),
            timeout=connect,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Content-Type"),
        )
        self._relay = Relay(self._session, self._engines, self._options, self._counts)
        server = web.Server(
            self._handle,
            handler_cancellation=True,  # who hangs up has its request cancelled, here and at the engine
            access_log=None,
            logger=_http,
            auto_decompress=False,
            keepalive_timeout=_IDLE,
            lingering_time=_LAST,
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=_LAST)
        await self._runner.setup()
        deadline = self._options.health_deadline
        await asyncio.gather(*(ask_health(self._session, engine, deadline) for engine in self._engines))
        self._watching = [
            asyncio.ensure_future(watched(self._session, engine, self._options)) for engine in self._engines
        ]
        host, port = self._options.host, self._options.port
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self.close()
            asked, true = f"The router was to listen at {host}:{port}.", f"The system says: {error.strerror or error}."
            raise AddressInvalid(asked, true, "Give --host of this machine and a free --port.") from None
        name, bound, *_ = self._runner.addresses[0]
        return f"http://[{name}]:{bound}" if ":" in name else f"http://{name}:{bound}"

    async def drain(self) -> int:
        """Take no more requests, and let those go on that are here; returns how many were not done in time."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), self._options.drain_seconds)
        except asyncio.TimeoutError:
            pass  # they are cut off by `close`; the caller is told how many
        return self._running

    async def close(self) -> None:
        """End."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await self._runner.cleanup()
        await self._session.close()

    # -- one request

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = _path(request)
        if path in _OWN:
            return self._own(request, path)
        identity = headers.request_id(request.headers.get(headers.REQUEST_ID))
        self._began()
        began = time.monotonic()
        try:
            answer = await self._answered(request, identity)
            self._counts.add("router_requests_total", path=_named(path), status=str(answer.status))
            self._counts.took("router_seconds", time.monotonic() - began, phase="whole")
            return answer
        except (asyncio.CancelledError, ConnectionError):
            self._counts.add("router_gone_total")
            raise
        finally:
            self._ended()

    async def _answered(self, request: web.BaseRequest, identity: str) -> web.StreamResponse:
        try:
            self._admit()
            handed = self._route(request)
            body = await self._read(request)
            said = bodies.read(body) if request.method == "POST" else None
            return await self._relay.answer(Asked(request, request.raw_path, body, said, identity, handed))
        except Refused as error:
            self._counts.add("router_refused_total", cause=error.cause)
            return _error(error.status, error.message, identity)
        except Unanswered as error:
            _log.warning("%s was not answered: %s", identity, error.message)
            if error.last is not None and error.last.answer is not None:  # the engine's own words
                last = error.last.answer
                kept = headers.downward(last.headers, identity)
                return web.Response(status=last.status, headers=kept, body=last.body)
            return _error(error.status, error.message, identity)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:  # a defect here costs its own request, and says so
            _log.exception("%s could not be answered", identity)
            if request.writer.output_size:  # it has begun
                raise ConnectionResetError("The answer had begun.") from None
            return _error(500, "The router has a defect; its log says more.", identity)

    def _admit(self) -> None:
        if self._draining:
            raise Refused(503, "draining", "This router is about to end. Ask again, and another one will answer.")
        if self._running > self._options.most:
            raise Refused(503, "busy", f"{self._options.most:,} requests are being answered. Ask again in a second.")

    def _route(self, request: web.BaseRequest) -> bool:
        """Whether this is handed over; raises `Refused` for what nobody answers."""
        path = _path(request)
        method = "POST" if path in _HANDED_OVER else _ALONE.get(path)
        if path.startswith(_ONE_MODEL) and ".." not in unquote(path):
            method = "GET"
        if method is None:
            known = ", ".join((*_HANDED_OVER, *_ALONE, *_OWN))
            raise Refused(404, "unknown", f"The router answers {known} and nothing else.")
        if request.method != method:
            raise Refused(405, "unknown", f"{_named(path)} is asked by {method}.")
        return path in _HANDED_OVER

    async def _read(self, request: web.BaseRequest) -> bytes:
        most = self._options.body_bytes
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Refused(415, "invalid", "The body is compressed, which this router does not read. Send it as it is.")
        too_large = Refused(413, "large", f"The body has more than {most:,} bytes.")
        if (request.content_length or 0) > most:
            raise too_large

        async def collected() -> bytes:
            body = bytearray()
            async for part in request.content.iter_any():
                body += part
                if len(body) > most:
                    raise too_large
            return bytes(body)

        try:
            return await asyncio.wait_for(collected(), self._options.client_seconds)
        except asyncio.TimeoutError:
            seconds = self._options.client_seconds
            raise Refused(408, "slow", f"The body was not here after {seconds:g} s.") from None
        except (aiohttp.ClientPayloadError, web.RequestPayloadError, aiohttp.http.HttpProcessingError) as error:
            raise Refused(400, "invalid", f"The body cannot be read ({type(error).__name__}).") from None

    def _began(self) -> None:
        self._running += 1
        self._idle.clear()
        self._counts.set("router_requests_running", self._running)

    def _ended(self) -> None:
        self._running -= 1
        self._counts.set("router_requests_running", self._running)
        if not self._running:
            self._idle.set()

    # -- what the router says of itself

    def _own(self, request: web.BaseRequest, path: str) -> web.Response:
        if request.method != "GET":
            return _error(405, f"{path} is asked by GET.", headers.request_id(None))
        if path == "/metrics":
            text = exposition(self._counts.samples(), METRICS)
            return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        ready = not self._draining and any(engine.up for engine in self._engines.decode)
        about = {
            "status": "draining" if self._draining else "ok" if ready else "no decode engine is up",
            "engines": [
                {"role": each.role, "engine": each.name, "up": each.up, "reason": each.reason, "running": each.running}
                for each in self._engines
            ],
        }
        body = msgspec.json.encode(about)
        return web.Response(status=200 if ready else 503, body=body, content_type="application/json")


def _path(request: web.BaseRequest) -> str:
    """As it was written, for so it is passed on: what means the same in other letters is another path here."""
    return str(request.raw_path.partition("?")[0])


def _named(path: str) -> str:
    """As metrics name it: what nobody knows may be anything, and has one name."""
    if path.startswith(_ONE_MODEL):
        return "/v1/models"
    return path if path in (*_HANDED_OVER, *_ALONE) else "other"


def _error(status: int, message: str, identity: str) -> web.Response:
    kind = _KINDS.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    body = bodies.error(status, kind, message)
    again = {"Retry-After": "1"} if status == 503 else {}
    answer = web.Response(
        status=status, body=body, content_type="application/json", headers={headers.REQUEST_ID: identity, **again}
    )
    # What is left of a body that was not read is no next request.
    answer.force_close()
    return answer
