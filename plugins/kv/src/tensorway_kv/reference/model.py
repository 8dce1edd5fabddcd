"""A tiny decoder whose every sum is exact: the KV of a token has the same bits however it was computed.

May import attrs, numpy and the core's errors. Values lie on a grid of 2**-12 and are smaller than 2**7, weights are
small whole numbers times a power of two. So each product, and each sum of products of this size, is a number that
float64 holds exactly, and the order in which a library adds them up cannot matter: not the size of a batch, not a
chunk, not how ranks share heads. What is not a sum is done element by element with what IEEE 754 rounds correctly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import attrs
import numpy as np
from numpy.typing import NDArray

from tensorway.errors import LayoutInvalid

Array = NDArray[Any]

_STEPS: Final = 4096.0
_LIMIT: Final = 128.0
#: Weights of tokens are on a grid of their own; smaller ones are nothing.
_SHARES: Final = 16384.0
_FAINTEST: Final = -16.0
#: Of attention: each head sees all tokens a little, so that no byte of a prompt is without effect.
_SHARPNESS: Final = 0.25
#: Logits are taken modulo one of this: a token follows from all bits of what is seen, not from its largest part.
_FOLDS: Final = 16.0
#: 2**f for f from 0 to 1, near enough: what counts is that all compute the same.
_POWER: Final = (0.0790, 0.2249, 0.6961, 1.0)
#: Numbers that attention works on at once.
_AT_ONCE: Final = 1 << 15
_ROWS: Final = 16
#: Longer sequences would need more bits than a sum has.
MAX_TOKENS: Final = 4096


@attrs.frozen
class ModelShape:
    """How large a model is, and which of all models of this size: equal shapes are equal weights."""

    vocabulary: int = 256
    width: int = 64
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_width: int = 16
    inner: int = 128
    seed: int = 1

    @property
    def facts(self) -> dict[str, str]:
        """What engines that hand over to each other must agree on."""
        return {"model": "tensorway-reference", "shape": "-".join(map(str, attrs.astuple(self)))}

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token, in all layers and heads."""
        return 2 * self.layers * self.kv_heads * self.head_width * np.dtype(np.float32).itemsize


def settled(values: Array) -> Array:
    """The nearest values of the grid; a zero has no sign."""
    found: Array = np.clip(np.rint(values * _STEPS) / _STEPS, -_LIMIT, _LIMIT) + 0.0
    return found


def normed(values: Array) -> Array:
    """Root mean square norm of each row."""
    mean = (values * values).sum(-1, keepdims=True) / values.shape[-1]
    return settled(values / np.sqrt(mean + 1e-3))


def times(rows: Array, matrix: Array) -> Array:
    """The product, a few rows at a time: with more of them a library starts threads, and then waits for those."""
    if len(rows) <= _ROWS:
        found: Array = rows @ matrix
        return found
    return np.concatenate([rows[at : at + _ROWS] @ matrix for at in range(0, len(rows), _ROWS)])


class Model:
    """All weights. `Shard` has what one rank's attention needs of them."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        wide = shape.heads * shape.head_width
        self._embedding = self._weights("embedding", shape.width, shape.vocabulary).T * 8
        self._mix = [self._weights(f"mix.{layer}", wide, shape.width) for layer in range(shape.layers)]
        self._up = [self._weights(f"up.{layer}", shape.width, shape.inner) for layer in range(shape.layers)]
        self._down = [self._weights(f"down.{layer}", shape.inner, shape.width) for layer in range(shape.layers)]
        self._out = self._weights("out", shape.width, shape.vocabulary)

    def embedded(self, tokens: Sequence[int]) -> Array:
        """What goes into the first layer."""
        found: Array = self._embedding[np.asarray(tokens, np.int64)]
        return settled(found)

    def mixed(self, layer: int, hidden: Array, heads: Array) -> Array:
        """The layer behind its attention, whose heads of all ranks are given."""
        hidden = settled(hidden + times(heads.reshape(len(hidden), -1), self._mix[layer]))
        inner = np.maximum(settled(times(normed(hidden), self._up[layer])), 0.0)
        return settled(hidden + times(inner, self._down[layer]))

    def chosen(self, hidden: Array) -> int:
        """The token that follows the one whose last hidden row this is: that of the largest logit, of equals the first.

        Logits are folded, so that what differs a little somewhere says other tokens: it is a model to test with.
        """
        return int(np.argmax((normed(hidden) @ self._out * _FOLDS) % 1.0))

    def continued(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """So many tokens that follow, computed anew for each from the first: no cache, no page, no chunk."""
        shard, known = Shard(self.shape), list(tokens)
        for _ in range(count):
            hidden = self.embedded(known)
            for layer in range(self.shape.layers):
                queries, keys, values = shard.projected(layer, hidden)
                hidden = self.mixed(layer, hidden, shard.attended(queries, keys, values, 0))
            known.append(self.chosen(hidden[-1]))
        return tuple(known[len(tokens) :])

    def _weights(self, name: str, rows: int, columns: int) -> Array:
        return weights(self.shape.seed, name, rows, columns)


class Shard:
    """The attention of one tensor-parallel rank: a share of the query heads, and the heads of keys that they read."""

    def __init__(self, shape: ModelShape, rank: int = 0, ranks: int = 1) -> None:
        if not 0 <= rank < ranks or shape.heads % ranks or shape.heads % shape.kv_heads:
            raise LayoutInvalid(
                f"Rank {rank} of {ranks} was to have a share of {shape.heads} heads over {shape.kv_heads}.",
                "Heads cannot be shared equally.",
                "Take a number of ranks that divides the heads, and heads that keys' heads divide.",
            )
        self.shape = shape
        group, each = shape.heads // shape.kv_heads, shape.heads // ranks
        own = range(rank * each, (rank + 1) * each)
        self._first = own.start // group
        self._kv_heads = range(self._first, (own.stop - 1) // group + 1)
        #: For each of its query heads, which of its own heads of keys that reads.
        self._reads = [head // group - self._first for head in own]
        #: By how much a head cares less for each token that is farther away.
        self._slopes = np.array([2.0 ** -(4 + head % 8) for head in own])
        self._projections = [self._projection(layer, own) for layer in range(shape.layers)]

    def _projection(self, layer: int, own: range) -> tuple[Array, Array, Array]:
        shape, wide = self.shape, self.shape.head_width
        queries = weights(shape.seed, f"q.{layer}", shape.width, shape.heads * wide)
        kept = [weights(shape.seed, f"{name}.{layer}", shape.width, shape.kv_heads * wide) for name in "kv"]
        held = slice(self._kv_heads.start * wide, self._kv_heads.stop * wide)
        return queries[:, own.start * wide : own.stop * wide], kept[0][:, held], kept[1][:, held]

    def projected(self, layer: int, hidden: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values of these tokens: rows by head."""
        rows, wide = normed(hidden), self.shape.head_width
        queries, keys, values = (
            settled(times(rows, one)).reshape(len(rows), -1, wide) for one in self._projections[layer]
        )
        return queries, keys, values

    def attended(self, queries: Array, keys: Array, values: Array, first: int) -> Array:
        """What each head sees: of queries from position `first` on, and keys and values from position 0 on."""
        keys, values = (one.astype(np.float64).transpose(1, 0, 2)[self._reads] for one in (keys, values))
        asks, positions = queries.transpose(1, 0, 2), np.arange(keys.shape[1])
        # A few rows at a time: what lies between stays in the processor's caches, and a sum is a sum in any order.
        rows = max(1, _AT_ONCE // (len(keys) * len(positions)))
        seen = []
        for at in range(0, len(queries), rows):
            distance = (first + np.arange(at, min(at + rows, len(queries))))[:, None] - positions
            scores = asks[:, at : at + rows] @ keys.transpose(0, 2, 1) * _SHARPNESS
            scores = np.where(distance >= 0, scores - self._slopes[:, None, None] * distance, -np.inf)
            shares = _powers(scores - scores.max(-1, keepdims=True))
            seen.append(settled(shares @ values / shares.sum(-1, keepdims=True)))
        found: Array = np.concatenate(seen, axis=1).transpose(1, 0, 2)
        return found


def weights(seed: int, name: str, rows: int, columns: int) -> Array:
    """Numbers from -127 to 127 times a power of two, such that sums of them stay near one; a formula, not a generator:
    they are the same under every version of numpy."""
    start = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    mixed = np.arange(1, rows * columns + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= np.frombuffer(start, "<u8").astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    whole = ((mixed >> np.uint64(40)) % np.uint64(255)).astype(np.float64) - 127.0
    found: Array = whole.reshape(rows, columns) * 2.0 ** -round(float(np.log2(73.0 * np.sqrt(rows))))
    return found


def _powers(exponents: Array) -> Array:
    """Two to the power of what is not above zero, on the grid of shares."""
    exponents = np.maximum(exponents, _FAINTEST)  # where nothing may be seen, it is minus infinity
    whole = np.floor(exponents)
    rest = exponents - whole
    value = np.full_like(rest, _POWER[0])
    for term in _POWER[1:]:
        value = value * rest + term
    found: Array = np.rint(np.ldexp(value, whole.astype(np.int32)) * _SHARES) / _SHARES
    return found
