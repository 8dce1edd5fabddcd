"""The connector `shared-store`: KV blocks by their content in a folder that engines share. May import this dist."""

from __future__ import annotations
