"""What a user may set on the tier `object`. Imports attrs only."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import urlsplit

import attrs

#: What a URL may begin with; what else obstore reads is of stores that cannot be written to.
SCHEMES: Final = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "file", "memory")
_MIB: Final = 1 << 20


def _is_url(_instance: object, _attribute: attrs.Attribute[Any], value: str) -> None:
    parts = urlsplit(value)
    place = parts.path if parts.scheme == "file" else parts.netloc
    # Without the value: some put a key into it.
    if value and (parts.scheme not in SCHEMES or not place.strip("/") or parts.password):
        raise ValueError(
            "url is not like s3://bucket/prefix, gs://bucket, az://container, file:///folder, memory://name"
        )


@attrs.frozen
class ObjectOptions:
    """Options of the tier `object`."""

    #: The bucket, and what the names of all objects in it begin with; it must be named.
    url: str = attrs.field(default="", validator=_is_url)
    #: Where the store answers, if it is not where its provider's always do: `https://minio.example:9000`.
    endpoint: str = ""
    #: The provider's region, where the environment does not say it.
    region: str = ""
    #: Whether the endpoint may be spoken to without TLS.
    allow_http: bool = False
    #: What else obstore is to be told, by its own names, such as credentials. No report shows it.
    config: dict[str, str] = attrs.field(factory=dict, repr=False)
    #: Whether blocks are written and removed; if not, the bucket may be one that we can only read.
    writable: bool = True
    #: Requests at once, of all calls together.
    concurrency: int = attrs.field(default=32, validator=[attrs.validators.ge(1), attrs.validators.le(1024)])
    #: How often one request is made before it has failed.
    attempts: int = attrs.field(default=4, validator=[attrs.validators.ge(1), attrs.validators.le(100)])
    #: Of all requests the part that may be made again, so that a store that is overloaded is not asked still more.
    retry_ratio: float = attrs.field(default=0.2, validator=[attrs.validators.ge(0.0), attrs.validators.le(1.0)])
    #: Seconds within which one is made again, the first time; twice as many with each further time.
    pause: float = attrs.field(default=0.1, validator=[attrs.validators.gt(0.0), attrs.validators.le(10.0)])
    #: Seconds that connecting may take, and one request with all its bytes.
    connect_timeout: float = attrs.field(default=5.0, validator=[attrs.validators.gt(0.0), attrs.validators.le(3600.0)])
    request_timeout: float = attrs.field(
        default=30.0, validator=[attrs.validators.gt(0.0), attrs.validators.le(3600.0)]
    )
    #: Blocks from this size on are uploaded in parts, several of one block at once.
    multipart_bytes: int = attrs.field(
        default=64 * _MIB, validator=[attrs.validators.ge(5 * _MIB), attrs.validators.le(4096 * _MIB)]
    )
    #: Bytes of each part.
    part_bytes: int = attrs.field(
        default=16 * _MIB, validator=[attrs.validators.ge(5 * _MIB), attrs.validators.le(1024 * _MIB)]
    )
