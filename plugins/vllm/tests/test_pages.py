"""vLLM's configuration and jobs in Tensorway's words; no vLLM is needed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tensorway.errors import LayoutInvalid, OptionsInvalid, Unsupported
from tensorway_cpu.canonical import canonical
from tensorway_vllm.offloading.inside import Inside
from tensorway_vllm.offloading.options import options_of
from tensorway_vllm.offloading.pages import facts_of, geometries, page_bytes, pages_of


def configured(*groups, nbytes=4096, world=1, rank=0, **parallel):
    sizes = {"pp_size": 1, "pcp_size": 1, "dcp_size": 1, "tp_size": world, **parallel}
    return SimpleNamespace(
        groups=[
            SimpleNamespace(tokens_per_block=tokens, layer_names=names, group_id=number)
            for number, (tokens, names) in enumerate(groups)
        ],
        worker_kv_bytes_per_block=nbytes,
        parallel=SimpleNamespace(rank=rank, world_size=world, **sizes),
        model=SimpleNamespace(name="tiny", dtype="float32"),
        kv_cache_layout="LBHNC",
    )


class Tensor:
    """As much of a tensor as is looked at."""

    def __init__(self, pages, nbytes, itemsize=1):
        self.array = np.zeros((pages, nbytes), np.int8)
        self.shape, self.device, self.itemsize = self.array.shape, "cpu", itemsize

    def data_ptr(self):
        return self.array.ctypes.data

    def stride(self, axis):
        return self.array.strides[axis]

    def element_size(self):
        return self.itemsize


def test_manager_and_worker_say_the_same_of_a_row():
    config = configured((16, ["a", "b"]))
    tensors = [[Tensor(8, 2048), Tensor(8, 2048)]]
    without, beside = geometries(config), geometries(config, tensors)
    assert page_bytes(config) == 2048
    assert canonical(without, 2, "NHD") == canonical(beside, 2, "NHD")
    assert [plane.base for plane in beside[0].planes] == [tensor.data_ptr() for tensor in tensors[0]]


def test_a_row_has_the_pages_of_all_ranks():
    [nbytes] = canonical(geometries(configured((16, ["a", "b"]), world=2)), 1, "NHD").nbytes
    assert nbytes == 2 * 4096


def test_groups_lie_in_the_same_pages():
    config = configured((16, ["a", "b"]), (16, ["c", "d"]))
    assert canonical(geometries(config), 1, "NHD").nbytes == (4096, 4096)


def test_memory_that_is_not_as_configured_is_refused():
    config = configured((16, ["a", "b"]))
    with pytest.raises(LayoutInvalid, match="4096 bytes; the configuration says 2048"):
        geometries(config, [[Tensor(8, 2048), Tensor(8, 4096)]])
    with pytest.raises(LayoutInvalid, match="2 layers has 1 pieces"):
        geometries(config, [[Tensor(8, 4096)]])


def test_layers_of_unequal_sizes_are_refused():
    with pytest.raises(LayoutInvalid, match="not of one size"):
        geometries(configured((16, ["a", "b", "c"])))


@pytest.mark.parametrize("what", ["pp_size", "pcp_size", "dcp_size"])
def test_parallelism_that_is_not_described_is_refused(what):
    with pytest.raises(Unsupported):
        geometries(configured((16, ["a", "b"]), **{what: 2}))


def test_facts_of_the_user_do_not_hide_those_of_the_engine():
    facts = facts_of(configured((16, ["a"])), "0.32.0", {"model": "mine"})
    assert (facts["model"], facts["user.model"]) == ("tiny", "mine")


def job(blocks, sizes, indices):
    return SimpleNamespace(block_ids=np.array(blocks, np.int32), group_sizes=sizes, block_indices=indices)


def test_pages_of_several_groups_follow_each_other():
    spec = pages_of(job([5, 6, 9], [2, 1], [3, 0]), 1)
    assert (spec.groups, spec.pages) == ([0, 0, 1], [[5], [6], [9]])


def test_a_block_that_begins_or_ends_elsewhere_lacks_pages():
    spec = pages_of(job([5, 6, 7, 8], [4], [3]), 2)
    assert spec.pages == [[-1, 5], [6, 7], [8, -1]]


def test_an_empty_group_has_no_block():
    assert pages_of(job([7], [0, 1], [3, 0]), 2).pages == [[7, -1]]


HEADS, TOKENS, VALUES, ITEM = 4, 8, 4, 2
HEAD = 2 * TOKENS * VALUES * ITEM


def row_of(ranks, order="HND", tokens=TOKENS, pages=1, inside=None):
    """What an engine of so many ranks, whose pages have heads one by one, has as a row."""
    config = configured(
        (tokens, ["a", "b"]), nbytes=2 * HEADS * HEAD * tokens // TOKENS // min(ranks, HEADS), world=ranks
    )
    return canonical(geometries(config, inside=inside or Inside(HEADS)), pages, order)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_rows_are_the_same_whatever_ranks_heads_are_divided_among(ranks, order):
    assert row_of(ranks, order).fingerprint({}) == row_of(1, order).fingerprint({})


def test_pages_of_unknown_heads_are_of_their_ranks():
    assert row_of(2, inside=Inside()).fingerprint({}) != row_of(1, inside=Inside()).fingerprint({})


def test_rows_with_tokens_in_columns_are_those_of_pages_twice_as_long():
    inside = Inside(HEADS, ITEM)
    assert row_of(2, pages=2, inside=inside).fingerprint({}) == row_of(1, tokens=2 * TOKENS, inside=inside).fingerprint(
        {}
    )


def test_parts_of_a_page_are_where_vllm_has_them_on_a_processor():
    """Of each head all keys, in columns, and then all values, in rows."""
    parts = Inside(HEADS, ITEM).parts(0, 1, 2, 2 * HEAD, TOKENS)
    assert [part.component for part in parts] == ["k.00002", "k.00003", "v"]
    taken = [
        part.offset + token * part.token_stride + head * part.head_stride + byte
        for part in parts
        for token in range(part.tokens)
        for head in range(part.heads)
        for byte in range(part.width)
    ]
    assert sorted(taken) == list(range(2 * HEAD))
    second = parts[1]
    assert (second.offset, second.token_stride, second.head_stride) == (HEAD, ITEM, TOKENS * ITEM)
    assert (parts[2].offset, parts[2].token_stride, parts[2].first) == (HEAD // 2, VALUES * ITEM, 2)


def test_heads_that_are_not_divided_evenly_are_refused():
    with pytest.raises(LayoutInvalid, match="4 KV heads are not divided evenly among 3 ranks"):
        Inside(HEADS).share(1, 3)


def mapping(offset, nbytes, writers=1):
    run = SimpleNamespace(local_offset=0, canonical_offset=offset, fragment_size=nbytes, num_fragments=1)
    return SimpleNamespace(runs=(run,), num_writers=writers)


def test_what_vllm_says_of_a_page_must_be_what_is_believed_here():
    own = 2 * HEAD
    Inside(HEADS).compare([mapping(own, own), None], 1, 2, own)
    Inside(HEADS).compare([mapping(HEAD, HEAD, 2)], 3, 8, HEAD)
    Inside().compare([mapping(1, 2)], 1, 2, own)
    for wrong in (mapping(0, own), mapping(own, HEAD), mapping(own, own, 2)):
        with pytest.raises(LayoutInvalid, match="heads from 2 on"):
            Inside(HEADS).compare([wrong], 1, 2, own)


def test_facts_tell_engines_apart_whose_pages_are_not_alike():
    config, other = configured((16, ["a"]), world=1), configured((32, ["a"]), world=2)
    heads, whole = Inside(4), Inside()
    assert facts_of(config, "1", {}, heads, "x86")["packing"] == "x86"
    assert facts_of(config, "1", {}, heads, "x86") != facts_of(other, "1", {}, heads, "x86"), "of unequal tokens"
    assert facts_of(config, "1", {}, heads, "x86", True) == facts_of(other, "1", {}, heads, "x86", True)
    assert facts_of(config, "1", {}, whole, "x86", True) != facts_of(other, "1", {}, whole, "x86", True)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("cpu_bytes_to_use", "capacity_bytes"),
        ("eviction_policy", "'policy'"),
        ("store_threshold", "'store_threshold'"),
        ("secondary_tiers", "'tiers'"),
        ("canonical_layout", "kv_heads"),
    ],
)
def test_options_of_vllms_own_offloading_are_refused_with_what_to_give_instead(name, instead):
    with pytest.raises(OptionsInvalid) as raised:
        options_of({name: 1})
    assert name in raised.value.true and instead in raised.value.to_do


def test_what_vllm_reads_itself_is_no_mistake():
    read = {"spec_name": "x", "spec_module_path": "y", "block_size": 64, "offload_prompt_only": False}
    assert options_of({**read, "self_describing_kv_events": True}).block_size == 64
    with pytest.raises(OptionsInvalid, match="lookup_seconds"):
        options_of({"lookup_second": 1})
