"""A server that speaks S3, alone on this machine; what comes between; and fresh interpreters."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensorway.offload import TierContext
from tensorway.testing import elsewhere, launching
from tensorway_object.testing.proxy import Proxy, proxy
from tensorway_object.testing.servers import S3, options_at

PROMISED = os.environ.get("TENSORWAY_TEST_LIBRARY")
NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def library() -> Any:
    """obstore; a session that was promised it fails without it."""
    found = importlib.util.find_spec("obstore")
    if found is None and PROMISED == "with":
        pytest.fail("TENSORWAY_TEST_LIBRARY=with, and obstore is not installed")
    if found is None or PROMISED == "without":
        pytest.skip("needs the library: pip install obstore")
    import obstore

    return obstore


@pytest.fixture(scope="session")
def s3(library: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A server that all tests share, and none harms; a session that was promised the library fails without it."""
    if importlib.util.find_spec("moto") is None:
        (pytest.fail if PROMISED == "with" else pytest.skip)("needs a server: pip install 'moto[server]'")
    with launching(S3, tmp_path_factory.mktemp("s3")) as launch:
        yield launch()


@pytest.fixture
def bucket(s3: S3) -> str:
    """A new bucket's name."""
    name = f"bucket-{next(NUMBERS)}"
    s3.bucket(name)
    return name


@pytest.fixture
def between(s3: S3) -> Iterator[Proxy]:
    """What comes between us and the server."""
    with proxy(s3.port) as server:
        yield server


@pytest.fixture
def context() -> Callable[..., TierContext]:
    """What tiers are made with; seconds may be given, and what else is not the same."""

    def make(**fields: Any) -> TierContext:
        return TierContext(**{"engine": "e0", "fingerprint": bytes(range(20)), "nbytes": (4096,), **fields})

    return make


@pytest.fixture
def open_tier(context: Callable[..., TierContext]) -> Iterator[Callable[..., Any]]:
    """Open tiers over the options that are given; all are closed in the end."""
    from tensorway_object.options import ObjectOptions
    from tensorway_object.tier import ObjectTier

    opened = []

    def make(options: dict[str, Any], **fields: Any) -> ObjectTier:
        opened.append(ObjectTier.open(ObjectOptions(**options), context(**fields)))
        return opened[-1]

    yield make
    for tier in opened:
        tier.close()


@pytest.fixture
def tier_at(open_tier: Callable[..., Any], bucket: str) -> Callable[..., Any]:
    """A tier over this test's bucket, by way of a port; retries are quick."""
    return lambda port, **options: open_tier(options_at(port, f"s3://{bucket}/a/b", **{"pause": 0.01, **options}))


@pytest.fixture
def hide(tmp_path: Path) -> Callable[..., Path]:
    """A folder that hides packages from the interpreters that have it on their path."""
    return partial(elsewhere.hide, tmp_path / "hiding")


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `object` in a process of its own with these folders in front of its path."""
    return partial(elsewhere.probe_elsewhere, "offload_tier", "object", native=("obstore",))
