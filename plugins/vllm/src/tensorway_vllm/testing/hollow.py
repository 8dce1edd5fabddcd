"""An executor without a model: what it computes of a token says which tokens came before it, and is checked when read.

May import vllm, numpy and torch. A step of a real model reads the KV of all earlier tokens and writes that of the new
ones. This one does the same with numbers: the page of a token holds a number made of all tokens up to it, so a page
that was loaded wrongly, too late, or given to two requests is seen as soon as anybody attends to it. What is sampled
is made of that number, too: whoever says other tokens has seen other pages.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Final

import attrs
import numpy as np
import torch
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin
from vllm.v1.worker.utils import allocate_kv_cache

#: Pages that hold nothing that anybody computed.
BLANK: Final = -1
_MASK: Final = (1 << 62) - 1
_WORDS: Final = 2000
_LAYERS: Final = 2
_HEADS, _WIDTH = 2, 8


class WrongPages(AssertionError):
    """A request attends to pages that do not hold its tokens."""


@attrs.define
class Text:
    """Tokens of a request: its prompt, and what is said to it, as far as anybody has asked."""

    tokens: list[int]
    #: The number after each token.
    stamps: list[int] = attrs.field(factory=list)

    def upto(self, stop: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Numbers of the first tokens; those behind the prompt are sampled."""
        for place in range(len(self.stamps), stop):
            if place == len(self.tokens):
                self.tokens.append(self.after(place))
            before = self.stamps[place - 1] if place else 1
            self.stamps.append((before * 6364136223846793005 + self.tokens[place] * 1442695040888963407 + 7) & _MASK)
        return np.array(self.stamps[:stop], np.int64)

    def after(self, place: int) -> int:
        """What is said after so many tokens."""
        self.upto(place)
        return 4 + (self.stamps[place - 1] >> 20) % _WORDS


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """What an engine that sees right pages says."""
    text = Text(list(prompt))
    text.upto(len(prompt) + count)
    return text.tokens[len(prompt) : len(prompt) + count]


def layers_of(kind: str, page_tokens: int, heads: int) -> dict[str, Any]:
    """What the layers of a model keep: `llama`, or `gemma2`, of which every other one has a window of 64 tokens."""
    common: dict[str, Any] = {
        "block_size": page_tokens,
        "num_kv_heads": heads,
        "head_size": _WIDTH,
        "dtype": torch.float32,
    }
    layers: dict[str, Any] = {}
    for layer in range(_LAYERS):
        name = f"model.layers.{layer}.self_attn.attn"
        windowed = kind == "gemma2" and layer % 2 == 0
        layers[name] = SlidingWindowSpec(**common, sliding_window=64) if windowed else FullAttentionSpec(**common)
    return layers


@attrs.define
class _Held:
    """A request on a rank: its blocks in each cache group."""

    prompt: int
    text: Text
    blocks: tuple[list[int], ...]
    #: Tokens that the scheduler knows of, or will when it is told what was sampled.
    known: int


class Rank:
    """One worker: memory, the connector's worker side, and a forward pass of numbers."""

    def __init__(self, config: Any, number: int, layers: dict[str, Any], supported: list[str]) -> None:
        self.config, self.number, self.layers, self.supported = config, number, layers, supported
        self.connector: Any = None
        #: Called with what this rank says of a step, before others see it; tests lie with it.
        self.said: Callable[[Any], Any] = lambda output: output
        self._held: dict[str, _Held] = {}
        #: Of each cache group, its layers: their pages, what numbers are mixed with by head, and their window.
        self._groups: list[list[tuple[Any, Any, int | None]]] = []
        self._page_tokens: list[int] = []

    def open(self, caches: Any) -> None:
        """Allocate, and make the worker's side of the connector."""
        memory = allocate_kv_cache(caches, torch.device("cpu"), self.config.cache_config.get_resolved_kv_cache_layout())
        for group in caches.kv_cache_groups:
            spec = group.kv_cache_spec
            self._page_tokens.append(spec.block_size)
            window = getattr(spec, "sliding_window", None)
            self._groups.append([(_pages(memory[name]), self._salts(name), window) for name in group.layer_names])
        for views in self._groups:
            for pages, _, _ in views:
                pages[:] = BLANK
        if self.config.kv_transfer_config is None:
            return
        self.connector = KVConnectorFactory.create_connector(
            config=self.config, role=KVConnectorRole.WORKER, kv_cache_config=caches
        )
        self.connector.register_kv_caches(memory)

    def execute(self, scheduled: Any) -> Any:
        """One step, in the order of vLLM's own model runner."""
        scheduled = pickle.loads(pickle.dumps(scheduled))
        if self.connector is None:
            self._update(scheduled)
            return self._forward(scheduled)
        with _current(self.connector), set_forward_context(None, self.config):
            self.connector.handle_preemptions(scheduled.kv_connector_metadata)
            self._update(scheduled)
            with KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(scheduled) as told:
                output = self._forward(scheduled)
        output.kv_connector_output = self.said(pickle.loads(pickle.dumps(told)))
        return output

    def close(self) -> None:
        """End."""
        if self.connector is not None:
            self.connector.shutdown()

    def _update(self, scheduled: Any) -> None:
        for name in scheduled.finished_req_ids:
            self._held.pop(name, None)
        for new in scheduled.scheduled_new_reqs:
            prompt = list(new.prompt_token_ids)
            blocks = tuple([*group] for group in new.block_ids)
            self._held[new.req_id] = _Held(len(prompt), Text(prompt), blocks, len(prompt))
        cached = scheduled.scheduled_cached_reqs
        for name, more, said in zip(cached.req_ids, cached.new_block_ids, cached.num_output_tokens, strict=True):
            held = self._held[name]
            if name in cached.resumed_req_ids:
                held.blocks, held.known = tuple([*group] for group in more), held.prompt + said
            elif more is not None:
                for held_blocks, added in zip(held.blocks, more, strict=True):
                    held_blocks.extend(added)

    def _forward(self, scheduled: Any) -> Any:
        begins = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        begins.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        names = list(scheduled.num_scheduled_tokens)
        sampled = [self._compute(name, begins[name], scheduled.num_scheduled_tokens[name]) for name in names]
        places = {name: place for place, name in enumerate(names)}
        return ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=sampled)

    def _compute(self, name: str, start: int, count: int) -> list[int]:
        held, stop = self._held[name], start + count
        stamps = held.text.upto(stop)
        for group, layers in enumerate(self._groups):
            for pages, salts, window in layers:
                mine = stamps[:, None, None] ^ salts
                begin = 0 if window is None else max(0, start - window + 1)
                self._check(name, pages, group, mine, begin, start)
                blocks, slots = self._places(group, held, start, stop)
                pages[blocks, slots] = mine[start:stop]
        if stop < held.known:
            return []
        held.known = stop + 1
        return [held.text.after(stop)]

    def _check(self, name: str, pages: Any, group: int, stamps: Any, begin: int, stop: int) -> None:
        blocks, slots = self._places(group, self._held[name], begin, stop)
        good = (pages[blocks, slots] == stamps[begin:stop]).all(axis=(1, 2))
        if not good.all():
            first = begin + int(np.argmin(good))
            true = "blank" if (pages[blocks[first - begin], slots[first - begin]] == BLANK).all() else "foreign"
            raise WrongPages(f"rank {self.number}: {name} attends to {stop} tokens, and token {first} is {true}")

    def _salts(self, layer: str) -> Any:
        """KV is that of a layer and a head; ranks that have the same head have the same KV."""
        first = self.number * _HEADS // self.config.parallel_config.world_size
        heads = np.arange(first, first + self.layers[layer].num_kv_heads, dtype=np.int64)
        return ((1 + list(self.layers).index(layer)) << 8 | heads)[:, None]

    def _places(self, group: int, held: _Held, start: int, stop: int) -> tuple[Any, Any]:
        tokens, each = np.arange(start, stop), self._page_tokens[group]
        return np.array(held.blocks[group], np.int64)[tokens // each], tokens % each


class Hollow(Executor):
    """Ranks in this process, as vLLM's engine core drives an executor."""

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """What is sampled is known when it is asked for."""
        return True

    def __init__(self, config: Any, ranks: int, kind: str, page_tokens: int, supported: list[str], room: int) -> None:
        self._room, self._sampled = room, None
        layers = layers_of(kind, page_tokens, max(1, _HEADS // ranks))
        self.ranks = [Rank(_of_rank(config, number), number, layers, supported) for number in range(ranks)]
        super().__init__(config)

    def _init_executor(self) -> None:
        pass

    def check_health(self) -> None:
        """It cannot be ill."""

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        """Of each rank."""
        return [rank.layers for rank in self.ranks]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        """Most preferred first."""
        return [rank.supported for rank in self.ranks]

    def determine_available_memory(self) -> list[int]:
        """For so many pages of all layers."""
        return [self._room * sum(spec.page_size_bytes for spec in rank.layers.values()) for rank in self.ranks]

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        """Memory is there now."""
        for rank, caches in zip(self.ranks, kv_cache_configs, strict=True):
            rank.open(caches)

    def collective_rpc(self, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None, **_: Any) -> Any:
        """Of what the engine core asks of workers beside, nothing is needed."""
        return [None for _ in self.ranks]

    def compile_or_warm_up_model(self) -> None:
        """There is no model."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """A step of all ranks; what is sampled is asked for with `sample_tokens`."""
        outputs = [rank.execute(scheduler_output) for rank in self.ranks]
        said: Any = outputs[0]
        if self.kv_output_aggregator is not None:
            said = self.kv_output_aggregator.aggregate(outputs)
        self._sampled = said if scheduler_output.total_num_scheduled_tokens else None
        return _done(None if self._sampled is not None else said, non_block)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """Of the last step."""
        return _done(self._sampled, non_block)

    def shutdown(self) -> None:
        """End."""
        for rank in self.ranks:
            rank.close()


def _pages(tensor: torch.Tensor) -> Any:
    """A layer's memory as numbers: by page, token, head, and place in it."""
    return tensor.permute(0, 2, 1, 3).view(torch.int64).numpy()


def _of_rank(config: Any, number: int) -> Any:
    mine = copy.copy(config)
    mine.parallel_config = copy.copy(config.parallel_config)
    mine.parallel_config.rank = number
    return mine


def _done(value: Any, non_block: bool) -> Any:
    if not non_block:
        return value
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@contextmanager
def _current(connector: Any) -> Iterator[None]:
    """vLLM's workers have one connector a process; here ranks take turns."""
    kv_transfer_state._KV_CONNECTOR_AGENT = connector
    try:
        yield
    finally:
        kv_transfer_state._KV_CONNECTOR_AGENT = None
