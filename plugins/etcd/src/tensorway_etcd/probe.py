"""Can etcd be spoken to from here? Asks no server: one may start after this process. May import the ground."""

from __future__ import annotations

import sys

from tensorway.types import ProbeResult


def probe() -> ProbeResult:
    """Look whether this Python has TLS; the rest is in every Python."""
    try:
        import ssl
    except ImportError as error:
        return ProbeResult.failed(f"this Python was built without TLS ({error})", "Install a Python with ssl.")
    python = ".".join(map(str, sys.version_info[:3]))
    return ProbeResult.passed(f"HTTP of Python {python}, TLS of {ssl.OPENSSL_VERSION}", tls=ssl.OPENSSL_VERSION)
