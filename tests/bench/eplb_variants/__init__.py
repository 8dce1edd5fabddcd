"""What `eplb.py` measures, as it runs in the ranks; not a script of its own."""

from __future__ import annotations
