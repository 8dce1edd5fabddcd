"""What came with a request in `kv_transfer_params`: a client may have written it, so it is checked first.

May import the standard library and attrs. A ticket is good for the tokens that it was made for, and no others: what
it is sealed with says which (`about`). Otherwise a client could give the ticket of one prompt with another one, and
the engine would cache the first one's blocks under the second one's name, for everybody.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from typing import Any, Final

import attrs

#: Under which the ticket, or the wish for one, is in `kv_transfer_params`.
TICKET: Final = "tensorway"
HAND_OVER: Final = "hand_over"
#: How many tokens of the prompt the ticket is about; in it, beside what is its connector's own.
TOKENS: Final = "prompt_tokens"


@attrs.frozen
class Promised:
    """What a request's ticket promises, if it is one."""

    #: As its connector issued it.
    ticket: Mapping[str, Any]
    #: Tokens from the first on whose KV there is.
    tokens: int
    #: What these tokens are.
    about: str


def wanted(request: Any) -> bool:
    """Whether another engine is to have the request's blocks."""
    return _params(request).get(HAND_OVER) is True


def promised(request: Any) -> Promised | None:
    """What came with it; None if that cannot be a ticket for it."""
    given = _params(request).get(TICKET)
    if not isinstance(given, dict):
        return None
    tokens = given.get(TOKENS)
    if type(tokens) is not int or not 0 < tokens <= request.num_prompt_tokens:
        return None
    what = about(request, tokens)
    if what is None:
        return None
    return Promised({name: value for name, value in given.items() if name != TOKENS}, tokens, what)


def told(ticket: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """What the client is told, for the engine that is to decode."""
    return {TICKET: {**ticket, TOKENS: tokens}}


def about(request: Any, tokens: int) -> str | None:
    """What the first tokens of its prompt are, in few letters; None for a prompt of embeddings, which has no tokens."""
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return None
    digest = hashlib.blake2b(digest_size=24, person=b"tensorway vllm")
    digest.update(array("q", request.prompt_token_ids[:tokens]).tobytes())
    adapter = request.lora_request.lora_name if request.lora_request is not None else None
    seen = [
        (feature.mm_position.offset, feature.identifier)
        for feature in request.mm_features
        if feature.mm_position.offset < tokens
    ]
    digest.update(repr((adapter, request.cache_salt, seen)).encode(errors="surrogatepass"))
    return f"{tokens}:{digest.hexdigest()}"


def _params(request: Any) -> Mapping[str, Any]:
    given = request.kv_transfer_params
    return given if isinstance(given, dict) else {}
