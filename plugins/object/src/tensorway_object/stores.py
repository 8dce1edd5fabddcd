"""The store that a URL names, as obstore opens it. May import the errors and its own package; loads obstore.

No request is made. obstore's own retries are off: ours know the call's deadline and what others are failing with.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from tensorway.errors import OptionsInvalid
from tensorway_object import library
from tensorway_object.options import ObjectOptions

#: What obstore calls a store's endpoint.
_ENDPOINTS: Final[Mapping[str, str]] = {
    "s3": "endpoint",
    "s3a": "endpoint",
    "gs": "base_url",
    "az": "endpoint",
    "azure": "endpoint",
    "abfs": "endpoint",
    "abfss": "endpoint",
}
_NO_RETRIES: Final = {"max_retries": 0, "retry_timeout": timedelta(0)}
#: Of `memory://name`, for as long as the process lives.
_memory: Final[dict[str, Any]] = {}
_lock: Final = threading.Lock()


def store_of(options: ObjectOptions) -> Any:
    """The store, below what its URL says."""
    scheme = urlsplit(options.url).scheme
    if not scheme:
        raise OptionsInvalid(
            "The tier object was asked for.",
            "Its option url is empty.",
            "Name the bucket: url = 's3://bucket/prefix'.",
        )
    try:
        if scheme == "memory":
            return _in_memory(options.url)
        if scheme == "file":
            return library.from_url(f"file://{Path(urlsplit(options.url).path).resolve()}", mkdir=True)
        config = dict(options.config)
        if options.endpoint:
            config[_ENDPOINTS[scheme]] = options.endpoint
        if options.region:
            config["region"] = options.region
        client = {
            "allow_http": options.allow_http,
            "connect_timeout": timedelta(seconds=options.connect_timeout),
            "timeout": timedelta(seconds=options.request_timeout),
            "pool_max_idle_per_host": str(options.concurrency),
        }
        return library.from_url(options.url, config=config, client_options=client, retry_config=_NO_RETRIES)
    except (ValueError, TypeError, OSError, library.Trouble) as error:
        # Without the URL and the configuration: there may be a key in them.
        raise OptionsInvalid(
            f"The tier object was to open a store of the kind {scheme}.",
            f"obstore refuses its options: {said_by(error)[:300]}.",
            "See its page for what each kind needs, and `config` for what has no option of its own.",
        ) from error


def said_by(error: BaseException) -> str:
    """What obstore says, in one line, without what it says for those who debug it."""
    text = str(error).partition("Debug source:")[0]
    return " ".join(text.split()).rstrip(". ") or type(error).__name__


def _in_memory(url: str) -> Any:
    with _lock:
        if url not in _memory:
            _memory[url] = library.MemoryStore()
        return _memory[url]
