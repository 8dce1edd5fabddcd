"""Asks engines for their health, again and again. May import aiohttp, the core and the modules beside it."""

from __future__ import annotations

import asyncio

import aiohttp

from tensorway_vllm.router.engines import Engine
from tensorway_vllm.router.options import RouterOptions


async def watched(session: aiohttp.ClientSession, engine: Engine, options: RouterOptions) -> None:
    """Ask one engine, until this is cancelled."""
    while True:
        await asked(session, engine, options.health_deadline)
        engine.look.clear()
        try:
            await asyncio.wait_for(engine.look.wait(), engine.pause)
            # One that fails request after request is not asked as fast as it can refuse.
            await asyncio.sleep(min(0.1, options.health_seconds))
        except asyncio.TimeoutError:
            pass  # nobody was in a hurry


async def asked(session: aiohttp.ClientSession, engine: Engine, deadline: float) -> None:
    """Ask it once."""
    limit = aiohttp.ClientTimeout(total=deadline)
    try:
        async with session.get(f"{engine.url}/health", timeout=limit, allow_redirects=False) as answer:
            if answer.status == 200:
                engine.healthy()
            else:
                # vLLM says 503 when its engine is dead, and it does not come back to life.
                engine.ill(f"its health has status {answer.status}", at_once=answer.status == 503)
    except aiohttp.ClientConnectorError as error:
        # That nobody listens is certain; a name that is not found, or a host that is not, may be found the next time.
        sure = isinstance(error.os_error, ConnectionRefusedError)
        engine.ill("nobody listens there" if sure else "it cannot be reached", at_once=sure)
    except asyncio.TimeoutError:
        engine.ill(f"it did not say within {deadline:g} s whether it is healthy")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        engine.ill(f"its health cannot be read ({type(error).__name__})")
