"""What an operator may ask of vLLM's expert balancing; needs no vLLM."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest

from tensorway.errors import OptionsInvalid
from tensorway_vllm.eplb.options import EplbOptions, asked

PAGE = Path(__file__).parents[3] / "docs" / "vllm-eplb.md"


@pytest.mark.parametrize("additional", [{}, {"tensorway": {}}, {"gdn_prefill_backend": "x", 3: 4}, object(), None])
def test_nothing_is_asked_where_nothing_is_said(additional):
    assert asked(additional) is None


def test_what_is_said_is_what_is_asked():
    found = asked({"tensorway": {"eplb": {"communicator": "gloo", "layer_seconds": 5, "receives_per_layer": 0}}})
    assert ("gloo", "", 5.0, 0) == (found.communicator, found.policy, found.layer_seconds, found.receives_per_layer)


@pytest.mark.parametrize(
    "given",
    [
        {"tensorway": None},
        {"tensorway": {"eplb": []}},
        {"tensorway": {"eplb": {}}},
        {"tensorway": {"eplb": {"communicator": "gloo", "receives_per_layer": -1}}},
        {"tensorway": {"eplb": {"communicator": "gloo", "open_seconds": float("inf")}}},
        {"tensorway": {"eplb": {"communicator": "gloo", "rendezvous_options": {"secret": "s"}}}},
        {"tensorway": {"kv": {}}},
    ],
)
def test_what_cannot_be_meant_is_refused(given):
    with pytest.raises(OptionsInvalid):
        asked(given)


def test_the_page_has_all_options_in_their_order():
    rows = re.findall(
        r"^\| `(\w+)` \|", PAGE.read_text("utf-8").partition("| option |")[2].split("\n\n")[0], re.MULTILINE
    )
    assert [field.name for field in attrs.fields(EplbOptions)] == rows
