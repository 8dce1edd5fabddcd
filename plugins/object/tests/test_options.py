from __future__ import annotations

import pytest

from tensorway.errors import OptionsInvalid
from tensorway.hookspecs import API
from tensorway.plugins.options import validated
from tensorway.types import HookContext
from tensorway_object.offers import offload_tier
from tensorway_object.options import ObjectOptions

OFFER = offload_tier(HookContext(api=API, core_version="0"))


def test_credentials_are_in_no_report():
    options = validated(OFFER, {"url": "s3://bucket/prefix", "config": {"secret_access_key": "hidden"}})

    assert ObjectOptions("s3://bucket/prefix", config={"secret_access_key": "hidden"}) == options
    assert "hidden" not in repr(options)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"url": "bucket/prefix"}, "url is not like"),
        ({"url": "s3://"}, "url is not like"),
        ({"url": "file:///"}, "url is not like"),
        ({"url": "http://host/bucket"}, "url is not like"),
        ({"url": "s3://user:hidden@bucket"}, "url is not like"),
        ({"concurrency": 0}, "concurrency"),
        ({"attempts": 0}, "attempts"),
        ({"part_bytes": 1 << 20}, "part_bytes"),
        ({"retry_ratio": 1.5}, "retry_ratio"),
        ({"bucket": "s3://bucket"}, "no option 'bucket'"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(given, says):
    with pytest.raises(OptionsInvalid) as refused:
        validated(OFFER, given)

    assert says in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_a_bucket_must_be_named(library, open_tier):
    with pytest.raises(OptionsInvalid, match="url is empty"):
        open_tier({})


def test_what_obstore_does_not_know_is_refused_in_its_words_without_values(library, open_tier):
    with pytest.raises(OptionsInvalid) as refused:
        open_tier({"url": "s3://bucket", "config": {"no_such_key": "hidden"}})

    assert "no_such_key" in str(refused.value)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize("url", ["gs://bucket/prefix", "az://container/prefix", "s3://bucket"])
def test_stores_of_every_provider_can_be_made_without_a_request(library, url):
    from tensorway_object.stores import store_of

    config = {"account_name": "us", "account_key": "aGlkZGVu"} if url.startswith("az") else {}
    config |= {"skip_signature": "true"}
    options = ObjectOptions(url, endpoint="http://127.0.0.1:1", allow_http=True, config=config)

    assert store_of(options)
