"""Which transports engines lend each other rows over."""

from __future__ import annotations

import importlib.util

import pytest

MISSING = [name for name in ("tensorway_nixl", "nixl_cu12") if importlib.util.find_spec(name) is None]
NIXL = pytest.mark.skipif(bool(MISSING), reason=f'needs {", ".join(MISSING)}: pip install "tensorway[nixl]"')


@pytest.fixture(params=["local", pytest.param("nixl", marks=NIXL)])
def transport(request):
    """One after the other."""
    return request.param
