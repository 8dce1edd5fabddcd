"""What a user may set on the connector `shared-store`. Imports attrs only."""

from __future__ import annotations

import attrs

_SECONDS = [attrs.validators.ge(0.01), attrs.validators.le(3600.0)]


@attrs.frozen
class SharedStoreOptions:
    """Options of the connector `shared-store`."""

    #: The folder that all engines see; it must exist.
    folder: str = ""
    #: What metrics call the folder.
    label: str = attrs.field(default="files", validator=[attrs.validators.min_len(1), attrs.validators.max_len(64)])
    #: Whether blocks of requests that ended are saved.
    save: bool = True
    #: Whether a file is on the disk before others see it, also if the host loses its power.
    sync: bool = False
    #: Bytes that the folder may hold; 0 for no end. What was not used for longest is removed.
    max_bytes: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    #: Seconds that looking for one request's blocks may take.
    lookup_deadline: float = attrs.field(default=1.0, validator=_SECONDS)
    #: Seconds that loading or saving one request may take.
    deadline: float = attrs.field(default=30.0, validator=_SECONDS)
    #: Requests that one rank loads or saves at once.
    threads: int = attrs.field(default=2, validator=[attrs.validators.ge(1), attrs.validators.le(64)])
    #: Where the ranks of an engine meet in its rendezvous.
    path: str = "/kv-store"
    #: Seconds after which the rendezvous misses a rank that died.
    presence: float = attrs.field(default=10.0, validator=[attrs.validators.ge(0.5), attrs.validators.le(3600.0)])
    #: What files are sealed with; empty for the deployment's secret, `TENSORWAY_SECRET`.
    secret: str = attrs.field(default="", repr=False)
