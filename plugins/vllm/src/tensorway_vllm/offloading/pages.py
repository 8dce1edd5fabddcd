"""vLLM's pages in Tensorway's words: what a rank's memory is, and which pages a job is about.

May import the core and the standard library. vLLM's objects are read by their fields, so that nothing here imports it.

The scheduler has a configuration and no memory, and manager and workers must say the same of a row. So a page is told
as it is in the configuration: so many bytes for each layer and rank, of which nobody here asks what they mean. What a
worker then finds in memory is compared with that. What is known of the inside of a page is in `inside`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from tensorway.errors import LayoutInvalid
from tensorway.geometry import Group, Plane, RankGeometry
from tensorway.offload import EngineSpec
from tensorway_vllm.offloading.inside import WHOLE, Inside
from tensorway_vllm.parallel import check_undivided

#: Where memory of other ranks is said to be; nobody reads it.
_ELSEWHERE: Final = 4096
_ASKED: Final = "KV blocks of vLLM were to be offloaded."


def check_supported(config: Any) -> None:
    """Raise `Unsupported` for what is not described rightly by a number of bytes for each layer and rank."""
    check_undivided(
        _ASKED,
        "Use tensor parallelism alone.",
        pipeline=config.parallel.pp_size,
        prefill_context=config.parallel.pcp_size,
        decode_context=config.parallel.dcp_size,
    )


def page_bytes(config: Any) -> int:
    """Of one page of one layer on one rank. Layers of all groups lie in the same pages, as many as the longest has."""
    layers = max(len(group.layer_names) for group in config.groups)
    whole, rest = divmod(int(config.worker_kv_bytes_per_block), layers)
    if not whole or rest:
        true = f"A block has {config.worker_kv_bytes_per_block} bytes in {layers} layers, which are not of one size."
        raise LayoutInvalid(_ASKED, true, "Offload models whose layers have pages of one size.")
    return whole


def geometries(
    config: Any, tensors: Sequence[Sequence[Any]] | None = None, inside: Inside = WHOLE
) -> list[RankGeometry]:
    """What all ranks have; `tensors`: of this rank, for each group those of its layers."""
    check_supported(config)
    nbytes = page_bytes(config)
    if tensors is not None:
        _compare(config, tensors, nbytes)
    return [
        _of_rank(config, inside, rank, nbytes, tensors if rank == config.parallel.rank else None)
        for rank in range(config.parallel.world_size)
    ]


def _of_rank(
    config: Any, inside: Inside, rank: int, nbytes: int, tensors: Sequence[Sequence[Any]] | None
) -> RankGeometry:
    planes: list[Plane] = []
    for number, group in enumerate(config.groups):
        for place, name in enumerate(group.layer_names):
            # No two planes of a rank may have the same component of a layer, and groups may have the same layers.
            parts = inside.parts(len(planes), rank, config.parallel.world_size, nbytes, group.tokens_per_block)
            base, stride, pages, device = _ELSEWHERE, nbytes, 1, "cpu"
            if tensors is not None:
                tensor = tensors[number][place]
                base, stride, pages = tensor.data_ptr(), int(tensor.stride(0)), int(tensor.shape[0])
                device = str(tensor.device)
            planes.append(Plane(f"{number}.{name}"[:200], number, base, nbytes, stride, pages, parts, device))
    groups = tuple(Group(group.tokens_per_block) for group in config.groups)
    return RankGeometry(tuple(planes), groups)


def tensors_of(caches: Any) -> list[list[Any]]:
    """Of each group, the tensors of its layers, from vLLM's `CanonicalKVCaches`."""
    return [[caches.tensors[ref.tensor_idx].tensor for ref in refs] for refs in caches.group_data_refs]


def mappings_of(caches: Any) -> list[Any]:
    """What vLLM says of the inside of each layer's pages; None where it says nothing."""
    return [getattr(ref, "mapping", None) for refs in caches.group_data_refs for ref in refs]


def _compare(config: Any, tensors: Sequence[Sequence[Any]], nbytes: int) -> None:
    """Memory must be what the configuration made the manager believe."""
    to_do = "Use the KV cache layout that the connector asks for, LBHNC, and layers of one size."
    for group, found in zip(config.groups, tensors, strict=True):
        if len(found) != len(group.layer_names):
            true = f"A group of {len(group.layer_names)} layers has {len(found)} pieces of memory."
            raise LayoutInvalid(_ASKED, true, to_do)
        for name, tensor in zip(group.layer_names, found, strict=True):
            length = int(tensor.shape[1]) * int(tensor.element_size())
            if length != nbytes or tensor.element_size() != 1 or tensor.stride(1) != 1:
                true = f"A page of {name} has {length} bytes; the configuration says {nbytes}."
                raise LayoutInvalid(_ASKED, true, to_do)


def facts_of(
    config: Any,
    version: str,
    more: dict[str, str],
    inside: Inside = WHOLE,
    packing: str = "",
    other_block_sizes: bool = False,
) -> dict[str, str]:
    """What makes bytes of equal keys equal. `packing`: what decides how an attention backend packs a head's page."""
    pages = ",".join(str(group.tokens_per_block) for group in config.groups)
    return {
        **{f"user.{name}": value for name, value in more.items()},
        "engine": f"vllm {version}",
        "model": config.model.name,
        "dtype": config.model.dtype,
        "layout": str(config.kv_cache_layout),
        "packing": packing,
        **({} if inside.heads else {"tp": str(config.parallel.tp_size)}),
        **({} if other_block_sizes else {"page_tokens": pages}),
    }


def pages_of(spec: Any, pages_per_block: int) -> EngineSpec:
    """Blocks of vLLM's `GPULoadStoreSpec`: the pages of a group follow each other, from any place in a block on."""
    groups: list[int] = []
    pages: list[list[int]] = []
    for group, taken in _runs(spec, pages_per_block):
        groups.append(group)
        pages.append(taken)
    return EngineSpec(groups, pages)


def _runs(spec: Any, each: int) -> Iterator[tuple[int, list[int]]]:
    numbers, begin = [int(number) for number in spec.block_ids], 0
    for group, (size, first) in enumerate(zip(spec.group_sizes, spec.block_indices, strict=True)):
        missing = first % each if size else 0
        padded = [-1] * missing + numbers[begin : begin + size]
        padded += [-1] * (-len(padded) % each)
        for place in range(0, len(padded), each):
            yield group, padded[place : place + each]
        begin += size
