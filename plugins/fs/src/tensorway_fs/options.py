"""What a user may set on the tier `fs`. Imports attrs only."""

from __future__ import annotations

from typing import Literal

import attrs

_SECONDS = [attrs.validators.ge(0.0), attrs.validators.le(3600.0)]


@attrs.frozen
class FsOptions:
    """Options of the tier `fs`."""

    #: The folder that blocks are kept in; it must exist. Engines on this host may share one.
    folder: str = ""
    #: `segments`: preallocated files with many blocks each; `files`: a plain file for each block, which other programs
    #: can copy.
    layout: Literal["segments", "files"] = "segments"
    #: Bytes that the folder may hold, of all fingerprints together; 0 for no end but the disk's. The oldest go first.
    max_bytes: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    #: Bytes of a segment, once there are some; at most an eighth of `max_bytes`.
    segment_bytes: int = attrs.field(
        default=256 << 20, validator=[attrs.validators.ge(64 << 10), attrs.validators.le(64 << 30)]
    )
    #: What is on the disk for certain, should the host lose its power: nothing, segments that are full, or every block
    #: before it is said to be stored.
    durability: Literal["none", "segment", "strict"] = "none"
    #: Whether blocks go past the page cache, where the file system and their buffers allow it.
    direct: bool = True
    #: Seconds after which a block that another process has stored is seen.
    refresh: float = attrs.field(default=0.05, validator=_SECONDS)
    #: Seconds after which a disk that was full or forbidden is tried again without being asked.
    retry: float = attrs.field(default=5.0, validator=_SECONDS)
    #: Files that may be open for reading.
    files: int = attrs.field(default=64, validator=[attrs.validators.ge(2), attrs.validators.le(65536)])
    #: What metrics call the tier.
    label: str = attrs.field(default="fs", validator=[attrs.validators.min_len(1), attrs.validators.max_len(64)])
