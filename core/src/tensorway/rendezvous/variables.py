"""The registry of environment variables: where the value of each is true.

Room `rendezvous`; may import the ground. In the whole cluster, on one host, in one process, or for nobody to see. What
is compiled or laid out may depend on those of the cluster only, and on none that did not opt in.
"""

from __future__ import annotations

import fnmatch
import re
import threading
from collections.abc import Iterable
from typing import Final, Literal, get_args

import attrs

from tensorway.errors import PluginDefect, SettingInvalid

Scope = Literal["cluster", "host", "rank", "secret"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATTERN: Final = re.compile(r"[A-Za-z0-9_*]*[A-Za-z0-9_][A-Za-z0-9_*]*")
_lock: Final = threading.Lock()


@attrs.frozen
class Variable:
    """One variable, or all that fit a pattern (`MC_*`)."""

    pattern: str
    scope: Scope
    #: Whether what is compiled or laid out depends on it. Opt-in: a forgotten one costs a compilation, not a mix-up.
    cache_key: bool = False
    #: Whether two hosts may well have the same by themselves (a port, a local rank): that is no sign of a copy then.
    coincides: bool = False

    def __attrs_post_init__(self) -> None:
        if not _PATTERN.fullmatch(self.pattern) or self.scope not in SCOPES:
            raise ValueError(f"{self.pattern!r} of scope {self.scope!r}: a name or a pattern, and one of {SCOPES}")
        if self.cache_key and self.scope != "cluster":
            raise ValueError(f"{self.pattern} is of scope {self.scope}, so a cache key with it would fit nobody else")

    def fits(self, name: str) -> bool:
        """Whether it is about the variable of this name; a secret is one in small letters, too."""
        return fnmatch.fnmatchcase(name.upper() if self.scope == "secret" else name, self.pattern)

    @property
    def rank(self) -> tuple[bool, bool, int]:
        """The order in which they count: a secret, a name, then patterns by how much they say."""
        return self.scope != "secret", "*" in self.pattern, -len(self.pattern.replace("*", ""))


def _all(scope: Scope, names: str, *, coincides: bool = False) -> tuple[Variable, ...]:
    return tuple(Variable(name, scope, coincides=coincides) for name in names.split())


#: What is known of the libraries that this project drives, of vLLM 0.32, and of launchers.
VARIABLES: Final[tuple[Variable, ...]] = (
    *_all("secret", "TENSORWAY_SECRET *_TOKEN *_API_KEY *_PASSWORD *_PASSWD *_PASSPHRASE *_CREDENTIALS *_JWT"),
    *_all("secret", "*_SECRET *_SECRET_KEY *_SECRET_ACCESS_KEY *_ACCESS_KEY *_ACCESS_KEY_ID *_PRIVATE_KEY"),
    # -- addresses of this host
    *_all("host", "*_HOST_IP HOST_IP *_NODE_IP NODE_IP POD_IP *_IF_IP *_SIDE_CHANNEL_HOST VLLM_LOOPBACK_IP"),
    *_all("host", "*_LOCAL_HOSTNAME"),
    *_all("host", "MC_*_BIND_ADDRESS UCX_RDMA_CM_SOURCE_ADDRESS NCCL_HOSTID"),
    # -- interfaces and devices of this host
    *_all("host", "*_SOCKET_IFNAME *_NET_DEVICES *_SOCK_IFNAME NCCL_OOB_NET_IFNAME NCCL_IB_HCA UCX_*_DEVICES"),
    *_all("host", "*_PCIE_MAPPING MC_*_FILTERS MOONCAKE_DEVICE"),
    *_all("host", "MC_CUSTOM_TOPO_JSON NCCL_TOPO_FILE NCCL_GRAPH_FILE VLLM_RPC_BASE_PATH", coincides=True),
    *_all("host", "VLLM_CPU_OMP_THREADS_BIND", coincides=True),
    # -- this process
    *_all("rank", "*_VISIBLE_DEVICES RANK LOCAL_RANK GROUP_RANK ROLE_RANK TENSORWAY_LOCAL_RANK", coincides=True),
    *_all("rank", "SLURM_* SLURMD_* OMPI_* PMI_* PMIX_* MPI_LOCALRANKID", coincides=True),
    *_all("rank", "*_SIDE_CHANNEL_PORT *_BOOTSTRAP_PORT *_PROMETHEUS_PORT VLLM_PORT", coincides=True),
    *_all("rank", "VLLM_DP_RANK_LOCAL VLLM_RAY_BUNDLE_INDICES", coincides=True),
    *_all("rank", "VLLM_DP_RANK VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME MOONCAKE_PREFERRED_SEGMENT"),
    # -- all the rest of them
    *_all("cluster", "TENSORWAY_* UCX_* NIXL_* NCCL_* RCCL_* GLOO_* MC_* MOONCAKE_* VLLM_*"),
    *_all("cluster", "MASTER_ADDR MASTER_PORT WORLD_SIZE PYTHONHASHSEED"),
)

_registered: Final[list[tuple[Variable, str]]] = []


def register(*variables: Variable, by: str) -> None:
    """Add variables of a plugin, or of yours; `by` says whose they are, for the error if another says otherwise.

    The most particular counts, whoever says it: a name before a pattern, and a longer pattern before a shorter one.
    What a pattern of secrets covers is a secret whatever else is said of it. The same again is no error.
    """
    with _lock:
        rows = [*((each, "tensorway") for each in VARIABLES), *_registered]
        for new in variables:
            for old, whose in rows:
                hides = old.scope == "secret" != new.scope and "*" not in new.pattern and old.fits(new.pattern)
                if hides or (old.pattern == new.pattern and old != new):
                    raise PluginDefect(
                        f"{by} registers {_said(new)}.",
                        f"{whose} has registered {_said(old)}.",
                        "Agree on one; an operator decides by TENSORWAY_ENVIRONMENT_POLICY=NAME=SCOPE.",
                    )
            if all(old != new for old, _ in rows):
                rows.append((new, by))
        _registered[:] = rows[len(VARIABLES) :]  # all of them, or none


def registered(operator: Iterable[Variable] = ()) -> tuple[Variable, ...]:
    """All that is known of variables, in the order in which it counts; an operator's word wins, but for secrets."""
    with _lock:
        rows = sorted([*VARIABLES, *(each for each, _ in _registered)], key=lambda each: each.rank)
    secrets = [each for each in rows if each.scope == "secret"]
    return (*secrets, *sorted(operator, key=lambda each: each.rank), *rows[len(secrets) :])


def policy(text: str) -> tuple[Variable, ...] | None:
    """What TENSORWAY_ENVIRONMENT_POLICY says: `on` or nothing, `off` (None here), or `NAME=SCOPE,NAME=SCOPE`."""
    if text.strip().lower() in ("", "on", "off"):
        return None if text.strip().lower() == "off" else ()
    items = [item.partition("=") for item in text.split(",") if item.strip()]
    try:
        return tuple(Variable(name.strip(), _scope(scope.strip())) for name, _, scope in items)
    except ValueError as error:
        raise SettingInvalid(
            f"TENSORWAY_ENVIRONMENT_POLICY={text[:200]!r} was set.",
            f"It is neither on nor off, nor does it say where variables are true ({error}).",
            "Write names or patterns with their scopes, UCX_NET_DEVICES=cluster,MY_*=host for example.",
        ) from error


def _scope(text: str) -> Scope:
    for scope in SCOPES:
        if scope == text:
            return scope
    raise ValueError(f"{text!r} is no scope: {', '.join(SCOPES)}")


def row_of(name: str, variables: Iterable[Variable]) -> Variable | None:
    """The first that is about a variable of this name; None for one that is not ours."""
    return next((each for each in variables if each.fits(name)), None) if _NAME.fullmatch(name) else None


def _said(variable: Variable) -> str:
    return f"{variable.pattern} as of scope {variable.scope}{', in the cache key' if variable.cache_key else ''}"
