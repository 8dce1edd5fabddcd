"""For tests, campaigns and benchmarks: tiers that misbehave, traces with a purpose, and what makes a prior.

May import the core and its `testing`; nothing that is shipped to run imports it.
"""

from __future__ import annotations
