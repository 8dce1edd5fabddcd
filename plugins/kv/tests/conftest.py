"""Lets the tests share `canonical` and `engines`, also the processes that they start, and a group of such processes.

pytest imports test modules by path, and a module beside them is not found then.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH", "")]))

from engines import TRANSPORTS  # noqa: E402  (found by the path above)

from tensorway.testing.ranks import Ranks  # noqa: E402


@pytest.fixture(scope="module")
def ranks():
    """Processes for the ranks of engines, which the tests of a module share."""
    with Ranks() as made:
        yield made


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    """One after the other."""
    return request.param
