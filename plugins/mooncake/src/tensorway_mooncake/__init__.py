"""Tensorway over Mooncake. Importing this, or `offers`, loads nothing of Mooncake; `library` does, at the first use."""

from __future__ import annotations
