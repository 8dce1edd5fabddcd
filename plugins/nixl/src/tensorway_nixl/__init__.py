"""Tensorway over NIXL. Importing this, or `offers`, loads nothing of NIXL; `library` does, at the first use."""

from __future__ import annotations
