"""Lets the tests share `canonical` and `engines`, also the processes that they start.

pytest imports test modules by path, and a module beside them is not found then.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH", "")]))
