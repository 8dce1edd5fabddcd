"""Tensorway over etcd. Importing this, or `offers`, opens no connection."""

from __future__ import annotations
