"""Tensorway's file tier. Importing this, or `offers`, touches no disk."""

from __future__ import annotations
