"""NIXL itself, loaded at the first use of one of `Agent`, `AgentConfig` and `Telemetry` (PEP 562).

May import tensorway's ground. Never the meta package `nixl`: importing it imports torch, which takes seconds.
"""

from __future__ import annotations

from typing import Final

from tensorway import settings
from tensorway.native import NativeLibrary, lazy_attributes
from tensorway.platforms import torch_build

#: Our names -> NIXL's; every build of NIXL since 1.0 has all three.
SYMBOLS: Final = {
    "Agent": "_api:nixl_agent",
    "AgentConfig": "_api:nixl_agent_config",
    "Telemetry": "_bindings:nixlXferTelemetry",
}
#: UCX keeps memory that was unregistered in its cache without a bound, and a KV cache then grows until the host is out
#: of memory (vllm-project/vllm#24264). NIXL set a bound once and dropped it again; ours holds for every version.
#: While its progress thread copies for us, who asks whether it is done spins on UCX's lock, and burns a processor that
#: the copy may need: a mutex halves the time of a large read over CMA on two cores.
ENVIRONMENT: Final = {"UCX_RCACHE_MAX_UNRELEASED": "1024", "UCX_USE_MT_MUTEX": "y"}


def packages() -> tuple[str, ...]:
    """The builds of NIXL in the order to try: the one for the CUDA that torch was built for comes first."""
    build = torch_build()
    return ("nixl_cu12", "nixl_cu13") if build and build.cuda_major == 12 else ("nixl_cu13", "nixl_cu12")


def keep_quiet() -> None:
    """What NIXL and UCX do to a process beside their work, unless the user wants it; before an agent is made."""
    # NIXL logs to stdout what it does, UCX its errors.
    settings.set_default("NIXL_LOG_LEVEL", "ERROR")
    settings.set_default("UCX_LOG_FILE", "stderr")
    # UCX takes over SIGHUP for its debug mode.
    settings.set_default("UCX_DEBUG_SIGNO", "0")
    # UCX takes a blank list for one of nothing; whoever left it blank has set nothing.
    lists = ("UCX_TLS", "UCX_NET_DEVICES")
    settings.unset(name for name in lists if not (settings.get(name) or "").strip())


LIBRARY: Final = NativeLibrary(
    name="NIXL",
    modules=packages,
    symbols=SYMBOLS,
    remedy='pip install "tensorway[nixl]"',
    environment=ENVIRONMENT,
)

__getattr__ = lazy_attributes(LIBRARY, __name__)
