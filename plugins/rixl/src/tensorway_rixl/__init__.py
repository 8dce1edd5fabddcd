"""Tensorway over NIXL for ROCm. Importing this, or `offers`, loads nothing native; `library` does, at the first use."""

from __future__ import annotations
