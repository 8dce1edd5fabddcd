"""What a request says, and what each engine is told of it. May import msgspec, the core, and what hand-overs
are called in requests.

What an engine is sent is written anew from what was read here, never cut out of the client's bytes: so that what was
checked is what is sent.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from tensorway.decoding import UNREADABLE
from tensorway_vllm.handover.wishes import HAND_OVER, TICKET

#: Fields by which an engine is told to fetch something from elsewhere.
_TRANSFERS: Final = ("kv_transfer_params", "ec_transfer_params")
MOST_OF_A_TICKET: Final = 1 << 20
_READ: Final = msgspec.json.Decoder(dict[str, Any])
_WRITE: Final = msgspec.json.Encoder()
#: Of no use where one token is computed, or not allowed there.
_DROPPED: Final = ("stream_options", "min_tokens", "logprobs", "top_logprobs", *_TRANSFERS)


class Refused(Exception):
    """A request that no engine is asked about, and how the client hears of it."""

    def __init__(self, status: int, cause: str, message: str) -> None:
        super().__init__(message)
        self.status, self.cause, self.message = status, cause, message


def read(raw: bytes) -> dict[str, Any]:
    """A request's body; raises `Refused` for what is none, and for one that says where its blocks are."""
    try:
        body = _READ.decode(raw)
    except UNREADABLE as error:
        why = str(error).splitlines()[0] if str(error) else "it is nested too deeply"
        raise Refused(400, "invalid", f"The body is no JSON object: {why}.") from None
    extra = body.get("vllm_xargs")
    for name in _TRANSFERS:
        if body.get(name) is not None or (isinstance(extra, dict) and name in extra):
            true = f"{name} is not taken from clients: by it an engine would be told whose memory to read."
            raise Refused(400, "ticket", f"{true} Leave it out; this router hands prompts over by itself.")
    return body


def alone(body: dict[str, Any], size: int, least: int) -> str | None:
    """Why this is not handed over, as `vocabulary.HANDED` says it; None if it is."""
    if size < least:
        return "short"
    prompt = body.get("prompt")
    # A ticket is for one prompt and one request; each of several would need one of its own.
    more = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    if more or body.get("use_beam_search") or any(body.get(name) not in (None, 1) for name in ("n", "best_of")):
        return "several"
    # Who wants to know of every token of the prompt has it computed where the answer is.
    if body.get("echo") or body.get("prompt_logprobs") is not None or body.get("prompt_embeds") is not None:
        return "whole"
    return None


def for_prefill(body: dict[str, Any], chat: bool) -> bytes:
    """The prompt, one token, and the wish for a ticket."""
    asked = {name: value for name, value in body.items() if name not in _DROPPED}
    asked |= {"stream": False, "max_tokens": 1, "kv_transfer_params": {HAND_OVER: True}}
    if chat:
        asked["max_completion_tokens"] = 1
    return _WRITE.encode(asked)


def for_decode(body: dict[str, Any], ticket: dict[str, Any] | None) -> bytes:
    """The request as it came, and the ticket."""
    asked = {name: value for name, value in body.items() if name not in _TRANSFERS}
    if ticket is not None:
        asked["kv_transfer_params"] = {TICKET: ticket}
    return _WRITE.encode(asked)


def ticket_in(raw: bytes) -> dict[str, Any] | None:
    """The ticket in a prefill engine's answer, None if it gave none; raises `ValueError` for what is no answer."""
    try:
        given = _READ.decode(raw).get("kv_transfer_params")
    except UNREADABLE:
        raise ValueError("it is no JSON object") from None
    if given is None:
        return None
    ticket = given.get(TICKET) if isinstance(given, dict) else given
    if ticket is not None and not isinstance(ticket, dict):
        raise ValueError("its ticket is none")
    if ticket is not None and len(_WRITE.encode(ticket)) > MOST_OF_A_TICKET:
        raise ValueError("its ticket is too long")
    return ticket


def error(status: int, kind: str, message: str) -> bytes:
    """An error as OpenAI's interface, and vLLM, say it."""
    return _WRITE.encode({"error": {"message": message, "type": kind, "param": None, "code": status}})


def begins_with_an_error(event: bytes) -> bool:
    """Whether a stream's first event says that the engine has failed; what the client did wrong is not for another."""
    line = event.lstrip().split(b"\n", 1)[0]
    if not line.startswith(b"data:"):
        return False
    try:
        said = _READ.decode(line[len(b"data:") :])
    except UNREADABLE:
        return False
    failed = said.get("error")
    return isinstance(failed, dict) and isinstance(failed.get("code"), int) and failed["code"] >= 500
