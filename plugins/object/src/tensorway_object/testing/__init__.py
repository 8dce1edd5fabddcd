"""What tests, campaigns and benchmarks of this dist share: an S3 server, what comes between, and long runs."""

from __future__ import annotations
