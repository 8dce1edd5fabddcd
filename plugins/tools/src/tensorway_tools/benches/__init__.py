"""Benchmarks of the core itself, which has none of its own: transports, discovery, the rendezvous."""

from __future__ import annotations
