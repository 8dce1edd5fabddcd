"""One request to one engine, as far as its first words. May import aiohttp and the modules beside it.

Until then nothing has been sent to the client, and another engine may be asked in its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp
import attrs
from yarl import URL

from tensorway_vllm.router import bodies
from tensorway_vllm.router.engines import Engine

#: Of a stream's first event, and of an error, no more is looked at.
_MOST_LOOKED_AT = 1 << 20


class EngineFailed(Exception):
    """An engine that gave no answer, and why, as `vocabulary.CAUSES` says it."""

    status = 502

    def __init__(self, cause: str, message: str, answer: Whole | None = None) -> None:
        super().__init__(message)
        self.cause, self.message, self.answer = cause, message, answer


@attrs.frozen
class Call:
    """What an engine is asked."""

    method: str
    #: With the query, as the client wrote it.
    path: str
    headers: Sequence[tuple[str, str]] = attrs.field(repr=False)
    body: bytes | None = attrs.field(repr=False)


@attrs.frozen
class Whole:
    """An answer that is here, all of it."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes = attrs.field(repr=False)


@attrs.define
class Begun:
    """An answer of which the first bytes are here; who has one closes it."""

    response: aiohttp.ClientResponse
    head: bytes = attrs.field(repr=False)
    #: Nothing comes after `head`.
    ended: bool

    @property
    def events(self) -> bool:
        """Whether it is a stream of events."""
        return bool(self.response.content_type == "text/event-stream")


async def begun(session: aiohttp.ClientSession, engine: Engine, call: Call, held: int, deadline: float) -> Begun:
    """Ask, and wait for the first words; raises `EngineFailed`, also if the engine goes down meanwhile."""
    asking = asyncio.ensure_future(_asked(session, engine, call, held))
    handed = False
    try:
        either: set[asyncio.Future[Any]] = {asking, engine.gone}
        await asyncio.wait(either, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            answer = asking.result()
            handed = True
            return answer
        if engine.gone.done():
            raise EngineFailed("out", f"It went down: {engine.reason}.")
        raise EngineFailed("late", f"It said nothing for {deadline:g} s.")
    finally:
        if not handed:  # the connection is closed with it, and the engine stops computing
            asking.cancel()
            await asyncio.wait({asking})
            if not asking.cancelled() and asking.exception() is None:
                asking.result().response.close()


async def _asked(session: aiohttp.ClientSession, engine: Engine, call: Call, held: int) -> Begun:
    try:
        url = URL(f"{engine.url}{call.path}", encoded=True)
        response = await session.request(call.method, url, headers=call.headers, data=call.body, allow_redirects=False)
    except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as error:
        raise EngineFailed("unreachable", f"It cannot be reached ({type(error).__name__}).") from None
    except (aiohttp.ClientResponseError, aiohttp.InvalidURL, ValueError) as error:
        raise EngineFailed("garbage", f"It does not speak HTTP ({type(error).__name__}).") from None
    except (aiohttp.ClientError, OSError) as error:
        raise EngineFailed("lost", f"The connection broke ({type(error).__name__}).") from None
    try:
        return await _first(response, held)
    except (aiohttp.ClientError, OSError) as error:
        response.close()
        raise EngineFailed("lost", f"The connection broke ({type(error).__name__}).") from None
    except BaseException:
        response.close()
        raise


async def _first(response: aiohttp.ClientResponse, held: int) -> Begun:
    answer = Begun(response, b"", False)
    failed = response.status >= 500 and response.status != 501
    wanted = _MOST_LOOKED_AT if failed or answer.events else held
    parts: list[bytes] = []
    size = 0
    while size < wanted and not answer.ended:
        if part := await response.content.readany():
            parts.append(part)
            size += len(part)
            # Events are short, and few of them come before a stream's first one is whole.
            if answer.events and not failed and end_of_events(b"".join(parts)):
                break
        else:
            answer.ended = True
    answer.head = b"".join(parts)
    if failed:
        whole = Whole(response.status, [*response.headers.items()], answer.head)
        response.close()
        raise EngineFailed("status", f"It answered {whole.status}.", whole if answer.ended else None)
    if answer.events and bodies.begins_with_an_error(answer.head):
        response.close()
        raise EngineFailed("error", "Its stream began with an error.")
    if answer.events and not answer.head:
        response.close()
        raise EngineFailed("lost", "Its stream ended before it began.")
    return answer


def end_of_events(text: bytes) -> int:
    """How much of this is whole events: what comes after it is the beginning of another."""
    return max((text.rfind(end) + len(end) for end in (b"\n\n", b"\r\n\r\n", b"\r\r") if end in text), default=0)
