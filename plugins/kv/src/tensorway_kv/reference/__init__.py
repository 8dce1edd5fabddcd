"""A minimal engine that a hand-over can be seen with: a tiny decoder, paged KV, a scheduler, processes. No torch.

May import the core, its `testing` for processes, numpy and this dist's layouts. It is no engine to serve anybody with:
it computes the same bits whichever way a token is computed, so that `the same tokens` says that every byte arrived.
"""

from __future__ import annotations

from tensorway_kv.reference.engine import Engine
from tensorway_kv.reference.model import Model, ModelShape
from tensorway_kv.reference.rank import EngineOptions
from tensorway_kv.reference.requests import Outcome, Request
from tensorway_kv.reference.serve import ServedEngine, Site

__all__ = ["Engine", "EngineOptions", "Model", "ModelShape", "Outcome", "Request", "ServedEngine", "Site"]
