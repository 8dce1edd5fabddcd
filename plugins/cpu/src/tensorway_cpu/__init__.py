"""Tensorway's offloading to host memory. Importing this, or `offers`, touches no memory and no device."""

from __future__ import annotations
