"""Tensorway over TCPStore. Importing this, or `offers`, does not import torch; the probe does, in its own process."""

from __future__ import annotations
