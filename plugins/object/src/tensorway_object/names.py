"""What objects are called: nothing that a client has said, and everything that an operator may want to list or delete.

May import the core's offload room. `v1/<fingerprint>/<tenant>/<hash>.<group>`: a model's blocks are below one prefix,
and a tenant's below one prefix of each model. Hashes spread the names of one tenant evenly.
"""

from __future__ import annotations

from typing import Final

from tensorway.offload import OffloadKey, key_group, key_hash, key_tenant

_VERSION: Final = "v1"


class Names:
    """Names of one fingerprint's objects, below what the URL says."""

    def __init__(self, fingerprint: bytes) -> None:
        self._root = f"{_VERSION}/{fingerprint.hex()}"
        #: Says what the fingerprint was made of.
        self.manifest = f"{self._root}/manifest.json"

    def block(self, key: OffloadKey) -> str:
        """One block's."""
        return f"{self.tenant(key_tenant(key))}/{key_hash(key).hex()}.{key_group(key)}"

    def tenant(self, tenant: bytes) -> str:
        """What all names of one tenant begin with."""
        return f"{self._root}/{tenant.hex()}"
