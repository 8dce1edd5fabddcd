"""What tests, benchmarks and campaigns of this dist share; nothing of it is imported by what is shipped to run."""

from __future__ import annotations
