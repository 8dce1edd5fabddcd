"""What people run beside the core's own commands: `tensorway demo`."""

from __future__ import annotations
