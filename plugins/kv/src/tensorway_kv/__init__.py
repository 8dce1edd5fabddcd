"""Tensorway's hand-over: which bytes of whose pages a request needs, who may read them how long, and moving them."""

from __future__ import annotations
