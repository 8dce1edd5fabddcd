"""What is handed over of vLLM's memory, and what a ticket is believed to be about. Needs no vLLM, and no torch."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tensorway.errors import LayoutInvalid, Unsupported
from tensorway_vllm.handover import wishes
from tensorway_vllm.handover.memory import Pages, Shape, geometry, shape_of

PAGE, COUNT, HEADS, WIDTH = 16, 6, 2, 8
LAYERS = ("a", "b", "c")


class Tensor:
    """As much of a tensor as is looked at."""

    def __init__(self, array):
        self.array, self.device = array, "cpu"
        self.shape = array.shape

    def element_size(self):
        return self.array.itemsize

    def stride(self, axis=None):
        steps = tuple(step // self.array.itemsize for step in self.array.strides)
        return steps if axis is None else steps[axis]

    def data_ptr(self):
        return self.array.ctypes.data


def memory(order):
    """Layers [L, B, H, N, C] in a physical order, as vLLM shows each of them."""
    axes = {"L": len(LAYERS), "B": COUNT, "H": HEADS, "N": PAGE, "C": WIDTH}
    whole = np.zeros([axes[name] for name in order], np.float32).transpose([order.index(name) for name in "LBHNC"])
    return {name: Tensor(whole[number]) for number, name in enumerate(LAYERS)}


def shape(*groups):
    return Shape(PAGE, groups or (Pages(0, LAYERS),), COUNT)


NBYTES = HEADS * PAGE * WIDTH * 4


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
def test_a_page_of_a_layer_is_one_piece_and_a_token_its_share_of_it(order):
    caches = memory(order)
    found = geometry(shape(), 1, caches)
    assert [plane.base for plane in found.planes] == [caches[name].data_ptr() for name in LAYERS]
    for plane in found.planes:
        [part] = plane.parts
        assert (plane.page_bytes, plane.stride, plane.pages) == (NBYTES, NBYTES, COUNT)
        assert (part.component, part.tokens, part.token_stride, part.width) == (
            "page.1.",
            PAGE,
            NBYTES // PAGE,
            NBYTES // PAGE,
        )
    assert len({plane.parts[0].layer for plane in found.planes}) == len(LAYERS)


@pytest.mark.parametrize("order", ["BLHNC", "BLNHC"])
def test_where_blocks_are_outermost_all_layers_of_a_page_are_one_piece(order):
    caches = memory(order)
    [plane] = geometry(shape(), 0, caches).planes
    assert (plane.base, plane.page_bytes, plane.stride) == (caches["a"].data_ptr(), 3 * NBYTES, 3 * NBYTES)


def test_layers_of_a_group_that_do_not_follow_each_other_are_pieces_of_their_own():
    caches = memory("BLHNC")
    found = geometry(shape(Pages(0, ("a", "c")), Pages(1, ("b",))), 0, caches)
    assert [(plane.group, plane.page_bytes, plane.stride) for plane in found.planes] == [
        (0, NBYTES, 3 * NBYTES),
        (0, NBYTES, 3 * NBYTES),
        (1, NBYTES, 3 * NBYTES),
    ]


def test_pages_that_vllm_has_cut_into_smaller_ones_are_whole():
    array = np.zeros((COUNT * 2, HEADS, PAGE // 2, WIDTH), np.float32)
    [plane] = geometry(shape(Pages(0, ("a",))), 0, {"a": Tensor(array)}).planes
    assert (plane.page_bytes, plane.stride, plane.pages) == (NBYTES, NBYTES, COUNT)


@pytest.mark.parametrize("order", ["LHBNC", "BHLNC"])
def test_memory_in_which_a_page_is_in_pieces_is_refused_with_what_to_ask_for(order):
    with pytest.raises(LayoutInvalid, match="is not one piece of memory") as caught:
        geometry(shape(), 0, memory(order))
    assert "LBHNC" in caught.value.to_do


def config(*specs, **parallel):
    sizes = {"pipeline_parallel_size": 1, "prefill_context_parallel_size": 1, "decode_context_parallel_size": 1}
    groups = [SimpleNamespace(layer_names=[f"l{at}"], kv_cache_spec=spec) for at, spec in enumerate(specs)]
    caches = SimpleNamespace(transfer_group_ids=tuple(range(len(specs))), kv_cache_groups=groups, num_blocks=COUNT)
    return SimpleNamespace(parallel_config=SimpleNamespace(**{**sizes, **parallel})), caches


def spec(kind, size=PAGE, **more):
    made = type(kind, (), {})()
    made.block_size = size
    for name, value in more.items():
        setattr(made, name, value)
    return made


FULL, MAMBA = spec("FullAttentionSpec"), spec("MambaSpec")


def test_windows_and_chunks_are_known_by_their_groups():
    window, chunk = (
        spec("SlidingWindowSpec", sliding_window=64),
        spec("ChunkedLocalAttentionSpec", attention_chunk_size=48),
    )
    groups = shape_of(*config(FULL, window, chunk)).groups
    assert [group.first(100) for group in groups] == [0, 37, 96]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (config(FULL, MAMBA), "keeps a state"),
        (config(FULL, spec("FullAttentionSpec", 32)), "pages of 16, 32 tokens"),
        (config(spec("CrossAttentionSpec")), "a CrossAttentionSpec"),
        (config(FULL, pipeline_parallel_size=2), "pipeline parallel size is 2"),
        (config(FULL, decode_context_parallel_size=2), "decode context parallel size is 2"),
        (config(), "no KV cache"),
    ],
    ids=["state", "unequal pages", "unknown", "pipeline", "context", "nothing"],
)
def test_what_cannot_be_handed_over_is_refused_in_three_lines(given, why):
    with pytest.raises(Unsupported, match=why) as caught:
        shape_of(*given)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("tokens", range(1, 6 * PAGE))
def test_the_pages_that_a_decoding_engine_asks_for_are_those_that_suffice(tokens):
    """vLLM leaves out of both lists what a window has left; the last token is computed anew."""
    window, about = 40, shape(Pages(0, ("a",)), Pages(1, ("b",), window=40))

    def held(resume):
        count = -(-resume // PAGE)
        gone = max(0, resume - window + 1) // PAGE
        return [list(range(1, count + 1)), [0] * gone + list(range(11 + gone, 11 + count))]

    kept = about.lists(held(tokens), tokens)
    needed = about.lists(held(tokens - 1), tokens - 1)
    reads = range(max(0, tokens - 1 - window + 1), tokens - 1)
    pages = {11 + token // PAGE for token in reads}
    assert pages <= set(needed[1]) and (not about.suffice(kept, tokens) or set(needed[1]) <= set(kept[1]))
    # Only where the window's first token is the last of a page, vLLM has given that page away.
    assert about.suffice(kept, tokens) == (tokens < window or (tokens - window + 1) % PAGE != 0)


# -- what a client sends


def request(prompt=(5, 6, 7, 8), params=None, **more):
    fields = {"lora_request": None, "cache_salt": None, "mm_features": [], "prompt_embeds": None, **more}
    return SimpleNamespace(
        request_id="r",
        prompt_token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        kv_transfer_params=params,
        **fields,
    )


def image(name, offset):
    return SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=offset))


def test_a_ticket_goes_through_a_router_and_is_what_it_was():
    params = json.loads(json.dumps(wishes.told({"seal": "x"}, 3)))
    found = wishes.promised(request(params=params))
    assert found is not None and (found.ticket, found.tokens) == ({"seal": "x"}, 3)
    assert found.about == wishes.about(request((5, 6, 7, 999)), 3)


@pytest.mark.parametrize(
    "params",
    [
        None, 7, "ticket", [], {}, {"tensorway": None}, {"tensorway": "x"}, {"tensorway": []}, {"tensorway": {}},
        {"tensorway": {"prompt_tokens": 0}}, {"tensorway": {"prompt_tokens": -1}}, {"tensorway": {"prompt_tokens": 5}},
        {"tensorway": {"prompt_tokens": True}}, {"tensorway": {"prompt_tokens": "3"}},
        {"tensorway": {"prompt_tokens": 1 << 80}}, {"tensorway": {"prompt_tokens": 2.0}}, {1: 2},
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_ticket_is_nothing(params):
    assert wishes.promised(request(params=params)) is None and not wishes.wanted(request(params=params))


@pytest.mark.parametrize("wish", [1, "true", "yes", [True], {}, None, False])
def test_only_true_is_a_wish(wish):
    assert not wishes.wanted(request(params={"hand_over": wish}))
    assert wishes.wanted(request(params={"hand_over": True}))


def test_what_a_ticket_is_about_differs_for_all_that_makes_blocks_differ():
    adapter = SimpleNamespace(lora_name="one")
    different = [
        request(),
        request((5, 6, 7, 9)),
        request((6, 5, 7, 8)),
        request(cache_salt="tenant"),
        request(lora_request=adapter),
        request(mm_features=[image("cat", 1)]),
        request(mm_features=[image("dog", 1)]),
        request(mm_features=[image("cat", 2)]),
    ]
    assert len({wishes.about(one, 4) for one in different}) == len(different)
    assert len({wishes.about(request(), tokens) for tokens in (1, 2, 3, 4)}) == 4
    behind = request(mm_features=[image("cat", 3)])
    assert wishes.about(behind, 3) == wishes.about(request(), 3) != wishes.about(behind, 4)


def test_a_prompt_of_embeddings_is_not_handed_over():
    assert wishes.about(request(prompt_embeds=object()), 2) is None
    whole = request(params={"tensorway": {"prompt_tokens": 2}})
    whole.prompt_token_ids = None
    assert wishes.promised(whole) is None
