from __future__ import annotations

import json

import pytest

from tensorway.errors import Incompatible
from tensorway_object import manifest

OPTIONS = {"url": "memory://manifest"}


@pytest.fixture
def written(context):
    return manifest.manifest_of(context(facts={"model": "m", "dtype": "bf16"}))


def test_people_can_read_it(written):
    told = json.loads(written)

    assert {"model": "m", "dtype": "bf16"} == told["facts"]
    assert [4096] == told["nbytes"] and bytes(range(20)).hex() == told["fingerprint"] and 1 == told["version"]


def test_equal_facts_have_equal_ones_in_any_order(written, context):
    assert written == manifest.manifest_of(context(facts={"dtype": "bf16", "model": "m"}))
    assert manifest.check(written, context(facts={"dtype": "bf16", "model": "m"}), "here")


@pytest.mark.parametrize("fields", [{"facts": {"model": "other"}}, {"nbytes": (1,)}, {"fingerprint": bytes(20)}])
def test_other_facts_are_refused_with_their_names(written, context, fields):
    with pytest.raises(Incompatible, match="dtype, model" if "facts" in fields else next(iter(fields))):
        manifest.check(written, context(**{"facts": {"model": "m", "dtype": "bf16"}, **fields}), "here")


def test_every_damage_is_told_from_other_facts(written, context):
    ours = context(facts={"model": "m", "dtype": "bf16"})
    for at in range(len(written)):
        changed = bytearray(written)
        changed[at] ^= 0x04
        assert manifest.check(bytes(changed), ours, "here") in (False, bytes(changed).split() == written.split())
    for data in (b"", b"{}", b"[1]", b"\xff\xfe", written[:-2]):
        assert not manifest.check(data, ours, "here")


def test_a_tier_writes_it_mends_it_and_refuses_what_another_wrote(s3, bucket, open_tier, library):
    from tensorway_object.options import ObjectOptions
    from tensorway_object.stores import store_of
    from tensorway_object.testing.servers import options_at

    options = options_at(s3.port, f"s3://{bucket}")
    open_tier(options, facts={"model": "m"})
    store = store_of(ObjectOptions(**options))
    (name,) = s3.names(bucket)
    before = bytes(store.get(name).bytes())

    store.put(name, before[:-9])
    open_tier(options, facts={"model": "m"})
    assert before == bytes(store.get(name).bytes())

    with pytest.raises(Incompatible, match="model differ"):
        open_tier(options, facts={"model": "n"})
