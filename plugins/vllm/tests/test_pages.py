"""vLLM's configuration and jobs in Tensorway's words; no vLLM is needed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tensorway.errors import LayoutInvalid, Unsupported
from tensorway_cpu.canonical import canonical
from tensorway_vllm.pages import facts_of, geometries, page_bytes, pages_of


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
