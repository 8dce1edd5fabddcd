"""The life of one request: prefill, decode, and the answer on its way to the client.

May import aiohttp, the core and the modules beside it. Whatever happens to engines, the client has an answer or an
error before `request_seconds` are over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Final

import aiohttp
import attrs
from aiohttp import web

from tensorway._logging import logger
from tensorway.metrics import Counters
from tensorway_vllm.router import bodies, headers
from tensorway_vllm.router.engines import Engine, Engines
from tensorway_vllm.router.options import RouterOptions
from tensorway_vllm.router.upstream import Begun, Call, EngineFailed, begun, end_of_events

_log = logger("vllm.router")
#: Of an answer that should be a token and a ticket.
_MOST_OF_A_PREFILL: Final = 4 << 20
#: Prefill engines that are asked for one ticket: the first may be down without anybody knowing yet.
_PREFILLS: Final = 2
#: Seconds for what is told to a client whose time is over.
_LAST_WORDS: Final = 2.0
#: Why an engine failed, as what became of the hand-over.
_RESULTS: Final = {"status": "refused", "error": "refused", "unreachable": "down", "out": "down"}


@attrs.define
class Asked:
    """A request of a client."""

    request: web.BaseRequest
    #: With the query.
    path: str
    body: bytes
    #: What is in it, if it has one.
    said: dict[str, Any] | None
    identity: str
    #: Whether its prompt is to be prefilled elsewhere.
    handed: bool
    began: float = attrs.field(factory=time.monotonic)

    def call(self, body: bytes | None) -> Call:
        """The same, for an engine."""
        up = headers.upward(self.request.headers.items(), self.request.remote, self.identity)
        return Call(self.request.method, self.path, up, body)


class Relay:
    """Answers requests, by engines."""

    def __init__(
        self, session: aiohttp.ClientSession, engines: Engines, options: RouterOptions, counts: Counters
    ) -> None:
        self._session, self._engines, self._options, self._counts = session, engines, options, counts

    async def answer(self, asked: Asked) -> web.StreamResponse:
        """Have it answered; raises `Refused` if no engine does."""
        end = asked.began + self._options.request_seconds
        ticket = await self._ticket(asked, asked.said) if asked.handed and asked.said is not None else None
        answer, engine = await self._decoded(asked, ticket, end)
        with engine:
            try:
                return await self._sent(asked, answer, engine, end)
            finally:
                answer.response.close()

    # -- prefill

    async def _ticket(self, asked: Asked, said: dict[str, Any]) -> dict[str, Any] | None:
        """The ticket, or none: then whoever decodes computes the prompt, which is never wrong."""
        result = bodies.alone(said, len(asked.body), self._options.hand_over_bytes)
        if result is None and not self._engines.prefill:
            return None
        ticket = None
        if result is None:
            result, ticket = await self._prefilled(asked, said)
            self._counts.took("router_seconds", time.monotonic() - asked.began, phase="prefill")
        self._counts.add("router_handed_over_total", result=result)
        return ticket

    async def _prefilled(self, asked: Asked, said: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
        call = asked.call(bodies.for_prefill(said, chat=asked.path.partition("?")[0].endswith("/chat/completions")))
        end = min(time.monotonic() + self._options.prefill_seconds, asked.began + self._options.request_seconds)
        tried: list[Engine] = []
        result = "down"
        for _ in range(_PREFILLS):
            engine = self._engines.choose("prefill", tried)
            if engine is None or engine in tried or time.monotonic() >= end:
                break
            tried.append(engine)
            try:
                return await self._prefilled_by(engine, call, end - time.monotonic())
            except EngineFailed as error:
                engine.failed(error.cause)
                _log.warning("Prefill of %s at %s failed: %s", asked.identity, engine.name, error.message)
                result = _RESULTS.get(error.cause, error.cause)
        return result, None

    async def _prefilled_by(self, engine: Engine, call: Call, deadline: float) -> tuple[str, dict[str, Any] | None]:
        with engine:
            answer = await begun(self._session, engine, call, _MOST_OF_A_PREFILL, deadline)
            answer.response.close() if not answer.ended else answer.response.release()
        if answer.response.status != 200:  # what the client did wrong, which the engine that decodes says to it
            return "refused", None
        if not answer.ended:
            raise EngineFailed("garbage", f"Its answer is longer than {_MOST_OF_A_PREFILL:,} bytes.")
        try:
            ticket = bodies.ticket_in(answer.head)
        except ValueError as error:
            raise EngineFailed("garbage", f"Its answer cannot be used: {error}.") from None
        engine.served()
        return ("none" if ticket is None else "ticket"), ticket

    # -- decode

    async def _decoded(self, asked: Asked, ticket: dict[str, Any] | None, end: float) -> tuple[Begun, Engine]:
        """The beginning of an answer, of the first decode engine that gives one."""
        failures: list[tuple[Engine, EngineFailed]] = []
        for _ in range(self._options.attempts):
            left = end - time.monotonic()
            engine = self._engines.choose("decode", [tried for tried, _ in failures])
            if engine is None or left <= 0:
                break
            if failures:
                self._counts.add("router_retries_total", cause=failures[-1][1].cause)
            body = asked.body if asked.said is None else bodies.for_decode(asked.said, ticket)
            streams = asked.said is not None and asked.said.get("stream") is True
            deadline = min(left, self._options.first_seconds) if streams else left
            try:
                with engine:
                    call = asked.call(body or None)
                    answer = await begun(self._session, engine, call, self._options.held_bytes, deadline)
                engine.served()
                return answer, engine
            except EngineFailed as error:
                engine.failed(error.cause)
                _log.warning("%s at %s failed: %s", asked.identity, engine.name, error.message)
                failures.append((engine, error))
                if error.cause in ("status", "error"):  # perhaps because of the ticket
                    ticket = None
        raise self._unanswered(failures, end)

    def _unanswered(self, failures: Sequence[tuple[Engine, EngineFailed]], end: float) -> bodies.Refused | Unanswered:
        if failures:
            error = failures[-1][1]
            late = error.cause == "late" or time.monotonic() >= end
            tried = ", ".join(f"{tried.name} ({why.cause})" for tried, why in failures)
            message = f"No decode engine answered. Tried: {tried}. The last one: {error.message}"
            return Unanswered(504 if late else 502, message, error)
        down = "; ".join(f"{engine.name}: {engine.reason}" for engine in self._engines.decode)
        return Unanswered(503, f"No decode engine is up. {down}.", None)

    # -- the answer

    async def _sent(self, asked: Asked, answer: Begun, engine: Engine, end: float) -> web.StreamResponse:
        down = headers.downward(answer.response.headers.items(), asked.identity)
        self._counts.took("router_seconds", time.monotonic() - asked.began, phase="first")
        if answer.ended and not answer.events:
            answer.response.release()
            return web.Response(status=answer.response.status, headers=down, body=answer.head)
        sent = web.StreamResponse(status=answer.response.status, headers=down)
        try:
            await _within(sent.prepare(asked.request), end)
            try:
                await self._passed_on(answer, sent, end)
            except (EngineFailed, OutOfTime) as error:
                await self._broken(asked, answer, engine, sent, error)
            else:
                await _within(sent.write_eof(), end)
        except asyncio.TimeoutError:  # the client does not read
            self._counts.add("router_broken_total", cause="late")
            _cut(asked.request)
        return sent

    async def _broken(
        self, asked: Asked, answer: Begun, engine: Engine, sent: web.StreamResponse, error: EngineFailed | OutOfTime
    ) -> None:
        """Tell the client that there is no more, and why."""
        if isinstance(error, EngineFailed):
            engine.failed(error.cause)
        self._counts.add("router_broken_total", cause=error.cause)
        _log.warning("%s at %s broke off: %s", asked.identity, engine.name, error.message)
        if not answer.events:  # an answer that ends as if it were whole would be believed
            _cut(asked.request)
            return
        text = f"{engine.name} broke off in the middle of the answer. {error.message}"
        now = time.monotonic()
        await _within(sent.write(b"data: " + bodies.error(error.status, "AnswerIncomplete", text) + b"\n\n"), now)
        await _within(sent.write_eof(), now)

    async def _passed_on(self, answer: Begun, sent: web.StreamResponse, end: float) -> None:
        """All of it, as it comes. Of events only whole ones: after a half one no error could be told."""
        content, rest = answer.response.content, answer.head
        ended = answer.ended
        while True:
            whole = len(rest) if ended or not answer.events else end_of_events(rest)
            whole = whole or (len(rest) if len(rest) > self._options.held_bytes else 0)
            if whole:
                await _within(sent.write(rest[:whole]), end)
                rest = rest[whole:]
            if ended:
                return
            left = end - time.monotonic()
            try:
                part = await asyncio.wait_for(content.readany(), max(min(self._options.silence_seconds, left), 0.0))
            except asyncio.TimeoutError:
                if time.monotonic() >= end:
                    raise OutOfTime(self._options.request_seconds) from None
                raise EngineFailed("late", f"It said nothing for {self._options.silence_seconds:g} s.") from None
            except (aiohttp.ClientError, OSError) as error:
                raise EngineFailed("lost", f"The connection broke ({type(error).__name__}).") from None
            ended, rest = not part, rest + part


class Unanswered(Exception):
    """No engine answered; and the last one's own words, if it had any."""

    def __init__(self, status: int, message: str, last: EngineFailed | None) -> None:
        super().__init__(message)
        self.status, self.message, self.last = status, message, last


class OutOfTime(Exception):
    """A request was not answered in the time that requests have, and no engine did wrong."""

    cause, status = "late", 504

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.message = f"The time of a request, {seconds:g} s, was over."


async def _within(written: Any, end: float) -> None:
    """Wait until the client has taken it; also at the end it has a little time, for the last words."""
    await asyncio.wait_for(written, max(end - time.monotonic(), 0.0) + _LAST_WORDS)


def _cut(request: web.BaseRequest) -> None:
    if request.transport is not None:
        request.transport.abort()
