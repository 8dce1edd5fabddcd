"""Tensorway over Redis. Importing this, or `offers`, does not import the client package and opens no connection."""

from __future__ import annotations
