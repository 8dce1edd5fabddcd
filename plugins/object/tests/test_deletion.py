"""What is removed, and what is not."""

from __future__ import annotations

from tensorway.offload import OfTenant, key_tenant, make_offload_key

KEYS = [make_offload_key(bytes([number]) * 32, 0, salt) for number in range(4) for salt in ("", "other")]


def test_what_is_no_tenant_has_no_blocks(library, open_tier, tmp_path):
    tier = open_tier({"url": f"file://{tmp_path}/store"})
    block = memoryview(bytes(4096))
    assert ["done"] * 8 == tier.put([(key, block) for key in KEYS], 30.0)
    for tenant in (b"", bytes(4), bytes(9)):
        assert 0 == tier.delete(OfTenant(tenant), 30.0)
    assert all(tier.contains(KEYS, 30.0)) and tier.probe(30.0).usable
    assert 4 == tier.delete(OfTenant(key_tenant(KEYS[1])), 30.0)
    assert [True, False] * 4 == tier.contains(KEYS, 30.0)
    assert list(tmp_path.rglob("manifest.json"))
