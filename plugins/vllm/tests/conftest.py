"""A session that promises vLLM must have it: without, most tests here skip, and say what to install."""

from __future__ import annotations

import importlib.util
import os

import pytest


def pytest_sessionstart(session):
    """Skipping everything where an engine was promised would hide a failure."""
    if os.environ.get("TENSORWAY_TEST_LIBRARY") == "with" and importlib.util.find_spec("vllm") is None:
        raise pytest.UsageError("TENSORWAY_TEST_LIBRARY=with, and vllm is not installed")
