"""A slice of the campaign; `python -m tensorway_object.testing.corruption` is all of it."""

from __future__ import annotations

import random

from tensorway_object.testing.servers import options_at


def test_no_damage_of_an_object_comes_back_as_data(library, tmp_path):
    from tensorway_object.testing.corruption import campaign

    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    done = campaign({"url": f"file://{tmp_path}"}, 400, seed)

    assert len(done) == 11 and done.total() > 300


def test_nor_over_s3(s3, bucket):
    from tensorway_object.testing.corruption import campaign

    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    assert 40 == campaign(options_at(s3.port, f"s3://{bucket}"), 40, seed).total()
