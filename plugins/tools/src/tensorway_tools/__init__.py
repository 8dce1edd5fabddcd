"""What people run beside the core's own commands: `tensorway demo`, `tensorway bench`, `tensorway top`."""

from __future__ import annotations
