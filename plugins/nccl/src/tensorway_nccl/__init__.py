"""Tensorway over NCCL. Importing this, or `offers`, loads no library; the probe does, in its own process."""

from __future__ import annotations
