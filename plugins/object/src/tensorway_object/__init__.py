"""Tensorway's object-store tier. Importing this, or `offers`, loads no library."""

from __future__ import annotations
