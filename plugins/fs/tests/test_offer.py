from __future__ import annotations

import pytest

from tensorway.errors import DeadlineExceeded, OptionsInvalid
from tensorway.hookspecs import API
from tensorway.plugins.options import validated
from tensorway.testing import OfferSuite
from tensorway.types import HookContext
from tensorway_fs import opening
from tensorway_fs.offers import construct, offload_tier
from tensorway_fs.options import FsOptions
from tensorway_fs.plain import FilesTier
from tensorway_fs.testing.blocks import CONTEXT
from tensorway_fs.tier import SegmentTier

OFFER = offload_tier(HookContext(api=API, core_version="0"))


class TestOffer(OfferSuite):
    kind = "offload_tier"
    name = "fs"


def test_the_layout_says_which_tier_it_is(tmp_path):
    for layout, kind in (("segments", SegmentTier), ("files", FilesTier)):
        tier = construct(validated(OFFER, {"folder": str(tmp_path), "layout": layout}), CONTEXT)
        assert isinstance(tier, kind)
        promised = {name for name in ("persistent", "shared", "deletes") if getattr(tier.capabilities, name)}
        assert promised == OFFER.capabilities
        tier.close()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"layout": "tree"}, "'layout'"),
        ({"durability": "most"}, "'durability'"),
        ({"max_bytes": -1}, "max_bytes"),
        ({"segment_bytes": 1}, "segment_bytes"),
        ({"files": 1}, "files"),
        ({"refresh": -0.1}, "refresh"),
        ({"label": ""}, "label"),
        ({"directory": "x"}, "'directory'"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(given, says):
    with pytest.raises(OptionsInvalid) as refused:
        validated(OFFER, given)
    assert says in str(refused.value)


def test_a_folder_must_be_named_and_exist(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("", str(tmp_path / "nowhere"), str(tmp_path / "file")):
        with pytest.raises(OptionsInvalid):
            construct(FsOptions(folder=folder), CONTEXT)


def test_a_folder_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    import threading

    import attrs

    hangs = threading.Event()
    monkeypatch.setattr(opening.Path, "is_dir", lambda self: hangs.wait(60))
    with pytest.raises(DeadlineExceeded):
        construct(FsOptions(folder=str(tmp_path)), attrs.evolve(CONTEXT, deadline=0.05))
    hangs.set()
