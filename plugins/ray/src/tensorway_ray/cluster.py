"""Ray itself, as this process is in it. May import tensorway's ground and its own package; imports Ray when asked."""

from __future__ import annotations

from typing import Any

from tensorway.errors import BackendUnavailable
from tensorway_ray.probe import INSTALL


def library(asked: str, cluster: str = "") -> Any:
    """Ray, once this process is in a cluster; enters `cluster` unless it is in one. Raises `BackendUnavailable`."""
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailable(asked, f"Ray cannot be loaded: {error}.", INSTALL) from error
    if not ray.is_initialized():
        if not cluster:
            true = "This process is in no Ray cluster."
            to_do = 'Call ray.init(address="auto") before; or name the cluster in the option `cluster`.'
            raise BackendUnavailable(asked, true, to_do)
        try:
            ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            true = f"The cluster {cluster!r} cannot be entered: {' '.join(str(error).split())[:200].rstrip('.')}."
            raise BackendUnavailable(asked, true, "See whether it runs: ray status --address ADDRESS") from error
    return ray
