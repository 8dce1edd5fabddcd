"""What is inside of a page of vLLM: whose heads it has, and where a token's bytes are, as far as that is known.

May import the core. vLLM's layout LBHNC has the heads of a page one behind the other, each with its keys and values of
all tokens. Which order these have within a head is the attention backend's. So the heads of a page can be given to
other ranks without knowing that order; for blocks of another size it must be known.
"""

from __future__ import annotations

from typing import Any, Final

import attrs

from tensorway.errors import LayoutInvalid
from tensorway.geometry import Part

_ASKED: Final = "KV blocks of vLLM were to be offloaded."
_WHOLE: Final = "Give 'kv_heads': 0, and each rank's pages stay whole."


@attrs.frozen
class Inside:
    """How pages are told in coordinates that engines share."""

    #: KV heads of the model. 0 if that is not known: then a page is of its rank and of nobody else.
    heads: int = 0
    #: Bytes of a number, where the keys of a head lie in columns, as on a processor without AMX, and tokens must be
    #: found in them. 0 takes what a head has in a page as rows of tokens: as it is on a GPU, and as does no harm
    #: anywhere while engines have pages of equal tokens.
    column: int = 0

    def share(self, rank: int, ranks: int) -> tuple[int, int, int]:
        """The first head of a rank, how many it has, and how many ranks have the same ones."""
        if self.heads % ranks and ranks % self.heads:
            raise LayoutInvalid(_ASKED, f"{self.heads} KV heads are not divided evenly among {ranks} ranks.", _WHOLE)
        own, copies = max(1, self.heads // ranks), max(1, ranks // self.heads)
        return rank // copies * own, own, copies

    def parts(self, layer: int, rank: int, ranks: int, nbytes: int, tokens: int) -> tuple[Part, ...]:
        """Of a page of so many bytes and tokens."""
        first, own, _ = self.share(rank, ranks) if self.heads else (0, 1, 1)
        head, rest = divmod(nbytes, own)
        width, more = divmod(head, tokens)
        if rest or more or (self.column and width % (2 * self.column)):
            true = f"A page of {nbytes} bytes has {tokens} tokens of {own} heads."
            raise LayoutInvalid(_ASKED, true, "Offload models whose tokens have a whole number of bytes.")
        name = "kv" if self.heads else f"page.{rank}"
        if not self.column:
            return (Part(layer, name, 0, tokens, width, first, own, head, width),)
        values = width // 2
        keys = (
            Part(
                layer,
                f"k.{first + number:05}",
                number * head,
                tokens,
                self.column,
                0,
                values // self.column,
                tokens * self.column,
                self.column,
            )
            for number in range(own)
        )
        return (*keys, Part(layer, "v", head // 2, tokens, values, first, own, head, values))

    def compare(self, mappings: list[Any], rank: int, ranks: int, nbytes: int) -> None:
        """Raise `LayoutInvalid` if vLLM itself says of pages that other heads are in them; None is of an old vLLM."""
        first, own, copies = self.share(rank, ranks) if self.heads else (0, 1, 1)
        expected = [(0, first * nbytes // own, nbytes, 1)]
        for mapping in mappings if self.heads else ():
            if mapping is None:
                continue
            runs = [
                (run.local_offset, run.canonical_offset, run.fragment_size, run.num_fragments) for run in mapping.runs
            ]
            if runs != expected or mapping.num_writers != copies:
                true = f"Rank {rank} of {ranks} would have heads from {first} on; vLLM says that they lie otherwise."
                raise LayoutInvalid(_ASKED, true, _WHOLE)


#: A page is of its rank, and what is in it nobody else's business.
WHOLE: Final = Inside()
