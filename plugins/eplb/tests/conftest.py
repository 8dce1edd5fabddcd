"""Lets the tests share `questions`: pytest imports test modules by path, and a module beside them is not found then."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
