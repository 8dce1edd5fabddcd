"""vLLM's pages as `TensorwayConnector` hands them over: whole, and as bytes of which nobody here asks what they mean.

May import the core. vLLM's objects are read by their fields, so that nothing here imports it, or a device library.

What is inside of a page is its attention backend's own affair (the one for processors packs keys by instruction set),
so a page goes from a rank to the same rank of an engine of the same kind, which the facts make sure of. That is why
the last page may be handed over while it is only partly computed: what is behind the tokens that are there is copied,
and never read. It is also why a page of a layer must be one piece of memory.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from tensorway.errors import LayoutInvalid, Unsupported
from tensorway.geometry import Group, Part, Plane, RankGeometry
from tensorway_vllm.parallel import check_undivided

_ASKED: Final = "KV blocks of vLLM were to be handed over by TensorwayConnector."
#: Where a scheduler, which has no memory, says that it is; nobody reads it.
_ELSEWHERE: Final = 4096
#: vLLM's page that stands for those that a window has left.
_NULL: Final = 0
#: More tokens than any request has: of a group with a window, its lists of pages say what is needed.
_ALL: Final = 1 << 30


@attrs.frozen
class Pages:
    """One cache group: which of vLLM's it is, its layers, and how far back a token sees."""

    place: int
    layers: tuple[str, ...]
    #: A token sees so many before it, with itself; 0 for all.
    window: int = 0
    #: Or those from the beginning of its chunk of so many; 0 for all.
    chunk: int = 0

    def first(self, token: int) -> int:
        """The first token that this one sees."""
        if self.window:
            return max(0, token - self.window + 1)
        return token // self.chunk * self.chunk if self.chunk else 0


@attrs.frozen
class Shape:
    """All that is handed over of a request."""

    #: Of each page.
    tokens: int
    groups: tuple[Pages, ...]
    #: How many pages there are.
    pages: int
    #: Whether vLLM has a hash for each page, and each is of use without what a window has left.
    hashed: bool = False

    def whole(self, tokens: int) -> int:
        """So many, with all of their last page."""
        return -(-tokens // self.tokens) * self.tokens

    def lists(self, blocks: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Of each group the pages of so many tokens; those that a window has left are not in its list."""
        count = -(-tokens // self.tokens)
        found = []
        for group in self.groups:
            ids = list(blocks[group.place][:count])
            begin = next((at for at, block in enumerate(ids) if block != _NULL), len(ids)) if _short(group) else 0
            found.append(ids[begin:])
        return found

    def suffice(self, lists: Sequence[Sequence[int]], tokens: int) -> bool:
        """Whether these pages are all that an engine needs which has so many tokens, and computes the last one anew."""
        count = -(-tokens // self.tokens)
        for group, ids in zip(self.groups, lists, strict=True):
            if len(ids) < count - group.first(max(0, tokens - 1)) // self.tokens:
                return False
        return True


def _short(group: Pages) -> bool:
    return bool(group.window or group.chunk)


def shape_of(vllm_config: Any, kv_cache_config: Any) -> Shape:
    """What is handed over; raises `Unsupported` for what cannot be."""
    _check_parallel(vllm_config.parallel_config)
    ids = kv_cache_config.transfer_group_ids
    groups = [(place, kv_cache_config.kv_cache_groups[place]) for place in ids]
    if not groups:
        raise Unsupported(_ASKED, "The model has no KV cache.", "Leave the connector out.")
    sizes = sorted({int(group.kv_cache_spec.block_size) for _, group in groups})
    if len(sizes) > 1:
        true = f"Its cache groups have pages of {', '.join(map(str, sizes))} tokens."
        raise Unsupported(_ASKED, true, "Hand over models whose groups have pages of as many tokens.")
    found = tuple(_pages(place, group) for place, group in groups)
    hashed = getattr(kv_cache_config, "hash_block_size", None) in (None, sizes[0]) and not any(map(_short, found))
    return Shape(sizes[0], found, int(kv_cache_config.num_blocks), hashed)


def _check_parallel(parallel: Any) -> None:
    check_undivided(
        _ASKED,
        "Use tensor and data parallelism alone.",
        pipeline=parallel.pipeline_parallel_size,
        prefill_context=getattr(parallel, "prefill_context_parallel_size", 1),
        decode_context=getattr(parallel, "decode_context_parallel_size", 1),
    )


def _pages(place: int, group: Any) -> Pages:
    names = tuple(group.layer_names)
    if getattr(group, "host_resident", False):
        raise Unsupported(_ASKED, f"Pages of {names[0]} are in a pool of the host.", "Leave HiSparse out.")
    spec = group.kv_cache_spec
    specs = list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]
    kinds = {_kind(one, names[0]) for one in specs}
    if len(kinds) > 1:
        true = f"Layers beside {names[0]} share its pages, and see unequally far back."
        raise Unsupported(_ASKED, true, "Hand over models without such layers.")
    return Pages(place, names, *kinds.pop())


def _kind(spec: Any, layer: str) -> tuple[int, int]:
    """How far back a layer sees: by its window, or by its chunk."""
    kinds = {kind.__name__ for kind in type(spec).__mro__}
    if "MambaSpec" in kinds:
        raise Unsupported(
            _ASKED,
            f"{layer} keeps a state: vLLM has that after the prompt, and who decodes needs that before the last token.",
            "Hand over models of attention alone.",
        )
    if "SlidingWindowSpec" in kinds:
        return int(spec.sliding_window) + int(getattr(spec, "extra_retained_tokens", 0)), 0
    if "ChunkedLocalAttentionSpec" in kinds:
        return 0, int(spec.attention_chunk_size)
    if "FullAttentionSpec" in kinds:
        return 0, 0
    true = f"{layer} keeps a {type(spec).__name__}, of which it is not known which tokens it needs."
    raise Unsupported(_ASKED, true, "Hand over models of full attention, windows and chunks.")


def geometry(shape: Shape, rank: int, caches: Mapping[str, Any] | None = None, attention: str = "") -> RankGeometry:
    """A rank's pages; without its memory, what a planner needs to know of any rank.

    Pages that other attention lays out are something else, and so they are called something else.
    """
    component = f"page.{rank}.{attention}"[:200]
    groups = tuple(Group(shape.tokens, _ALL if _short(group) else 0) for group in shape.groups)
    planes: list[Plane] = []
    for number, group in enumerate(shape.groups):
        if caches is None:
            pages = {"elsewhere": _Page(_ELSEWHERE, shape.tokens, shape.tokens)}
        else:
            pages = _joined({name: _page(name, caches[name], shape) for name in group.layers})
        for name, page in pages.items():
            planes.append(_plane(f"{number}.{name}"[:200], number, component, len(planes), page, shape.tokens))
    found = RankGeometry(tuple(planes), groups)
    if caches is not None:
        found.check(f"rank {rank} of vLLM")
    return found


@attrs.frozen
class _Page:
    """Where pages of equal shape are: the first one, its bytes, and how far the next one is."""

    base: int
    nbytes: int
    stride: int
    count: int = 1
    device: str = "cpu"


def _page(name: str, tensor: Any, shape: Shape) -> _Page:
    """A layer's pages; vLLM may have cut each into several that follow each other."""
    width = int(tensor.element_size())
    parts, rest = divmod(int(tensor.shape[0]), shape.pages)
    inner = math.prod(map(int, tensor.shape[1:]))
    extent = 1 + sum(
        (int(size) - 1) * int(step) for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    )
    step = int(tensor.stride(0))
    if not parts or rest or extent != inner or (parts > 1 and step != inner):
        true = f"A page of {name} is not one piece of memory: shape {tuple(tensor.shape)}, strides {tensor.stride()}."
        raise LayoutInvalid(_ASKED, true, "Ask for the layout LBHNC or BLHNC, by the option `layout`.")
    nbytes = inner * parts * width
    return _Page(tensor.data_ptr(), nbytes, step * parts * width, shape.pages, str(tensor.device))


def _joined(pages: Mapping[str, _Page]) -> dict[str, _Page]:
    """Layers whose pages follow each other are one: then a page is moved in one piece, however many layers it has."""
    ordered = sorted(pages.items(), key=lambda item: item[1].base)
    first = ordered[0][1]
    together = all(
        attrs.evolve(page, base=first.base) == first and page.base == first.base + place * first.nbytes
        for place, (_, page) in enumerate(ordered)
    )
    nbytes = len(ordered) * first.nbytes
    if len(ordered) == 1 or not together or nbytes > first.stride:
        return dict(pages)
    return {f"{ordered[0][0]} and {len(ordered) - 1} more": attrs.evolve(first, nbytes=nbytes)}


def _plane(name: str, group: int, component: str, layer: int, page: _Page, tokens: int) -> Plane:
    """Pages, as one component: no two planes of a rank may have the same one of a layer, so `layer` counts planes."""
    width, rest = divmod(page.nbytes, tokens)
    if rest:
        true = f"A page of {name} has {page.nbytes} bytes and {tokens} tokens."
        raise Unsupported(_ASKED, true, "Hand over models whose tokens have a whole number of bytes.")
    part = Part(layer, component, 0, tokens, width, 0, 1, width, width)
    return Plane(name, group, page.base, page.nbytes, page.stride, page.count, (part,), page.device)


def attention_of(vllm_config: Any, shape: Shape) -> str:
    """Who lays pages out on this rank; empty if no layer says so."""
    layers = getattr(vllm_config.compilation_config, "static_forward_context", {})
    names = (name for group in shape.groups for name in group.layers if name in layers)
    return "+".join(sorted({layers[name].get_attn_backend().get_name() for name in names}))


def facts_of(
    vllm_config: Any, kv_cache_config: Any, version: str, model: str, more: Mapping[str, str]
) -> dict[str, str]:
    """What makes pages of two engines alike, beside their shapes; the same on both sides of an engine."""
    about, cache = vllm_config.model_config, vllm_config.cache_config
    return {
        **{f"user.{name}": value for name, value in more.items()},
        "engine": f"vllm {version}",
        "model": model or about.model,
        "revision": str(about.revision),
        "dtype": str(about.dtype),
        "cache": str(cache.cache_dtype),
        "quantization": str(about.quantization),
        "layout": str(kv_cache_config.kv_cache_layout),
        "tp": str(vllm_config.parallel_config.tensor_parallel_size),
        "page": str(cache.block_size),
        "processor": processor_of(str(vllm_config.device_config.device_type)),
    }


def processor_of(device: str) -> str:
    """What pages in memory of the host depend on: their inside follows the instructions that the processor has."""
    if not device.startswith("cpu"):
        return ""
    import torch  # vLLM has imported it long before

    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{' AMX' if amx else ''}"
