"""How a cache group of an engine lies in files: one file for a block and rank, page after page, without addresses.

May import the core, msgspec and this package's topology. Each group of layers is a section of its own, so that a block
of which an engine keeps only some groups, as of sliding windows, is stored as far as it is there. Ranks whose pages are
equal write one file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final

import attrs
import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.errors import DescriptionInvalid, Incompatible, LayoutInvalid, Unsupported
from tensorway.kv import Group, KVContext, Plane, RankGeometry
from tensorway_kv.store.folder import Folder
from tensorway_kv.store.seals import OVERHEAD, Seals
from tensorway_kv.topology import EngineTransferInfo, TransferTopology

#: Where the first page of a file would lie in memory, for an address is never 0.
BASE: Final = 1 << 12
#: Bytes of a manifest; more is a mistake.
_LONGEST: Final = 16 << 20
#: An engine whose life does not matter, for all of its lives wrote the same.
_ANY: Final = "any"


class Manifest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What files of a layout hold, and whose they are."""

    #: What both engines must agree on, in order.
    facts: tuple[tuple[str, str], ...]
    #: One rank for each that writes: the n-th writes files `.rN`.
    info: EngineTransferInfo

    @property
    def block_tokens(self) -> int:
        """Of each of its blocks."""
        return self.info.ranks[0].groups[0].block_tokens

    def nbytes(self, rank: int) -> int:
        """What a file of a rank holds."""
        return sum(plane.page_bytes for plane in self.info.ranks[rank].planes)


_ENCODE: Final = msgspec.msgpack.Encoder().encode
_DECODE: Final = msgspec.msgpack.Decoder(Manifest).decode
#: A digest as a part of a key.
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{40}$")]


@attrs.frozen
class Section:
    """One cache group of the own engine."""

    group: int
    manifest: Manifest
    #: The manifest as it is written, and its fingerprint.
    encoded: bytes
    fingerprint: bytes
    #: For each rank of the engine which rank of the manifest it is; None for those that have nothing of the group.
    places: tuple[int | None, ...]
    #: Whether a rank is the one of its place that writes.
    writers: tuple[bool, ...]

    @property
    def layout(self) -> str:
        """The fingerprint as a part of keys."""
        return self.fingerprint.hex()


def check(context: KVContext) -> RankGeometry:
    """The geometry of a context, if its blocks can be stored one by one; raises what says why they cannot."""
    asked = f"KV blocks of engine {context.engine} were to be shared through a folder."
    if context.geometry is None:
        raise LayoutInvalid(asked, "Its geometry was not given.", "Give the memory of a rank in the context.")
    context.geometry.check(f"rank {context.rank} of {context.engine}")
    sizes = [group.block_tokens for group in context.geometry.groups]
    if 0 in sizes:
        true = f"Its group {sizes.index(0)} is a state, which is of a whole sequence and not of a block."
        raise Unsupported(asked, true, "Take the connector `handover` for it.")
    if len(set(sizes)) > 1:
        true = (
            f"Its groups have blocks of {', '.join(map(str, sorted(set(sizes))))} tokens, and a hash is of one block."
        )
        raise Unsupported(asked, true, "Configure one block size for all groups.")
    return context.geometry


def sections(ranks: Sequence[RankGeometry], facts: Mapping[str, str], seals: Seals) -> list[Section]:
    """Of all groups that any rank has pages of."""
    made = []
    for group, about in enumerate(ranks[0].groups):
        normal = [_normal(rank, group) for rank in ranks]
        distinct = list(dict.fromkeys(one for one in normal if one is not None))
        if not distinct:
            continue
        manifest = Manifest(tuple(sorted(facts.items())), EngineTransferInfo(_ANY, _ANY, tuple(distinct)))
        encoded = _ENCODE(manifest)
        places = tuple(None if one is None else distinct.index(one) for one in normal)
        writers = tuple(one is not None and one not in normal[:rank] for rank, one in enumerate(normal))
        assert about.block_tokens
        made.append(Section(group, manifest, encoded, seals.fingerprint(encoded), places, writers))
    return made


def of_group(rank: RankGeometry, group: int) -> RankGeometry | None:
    """A rank as if it had this group only, and no window: what is stored does not depend on who keeps it how long."""
    planes = tuple(msgspec.structs.replace(plane, group=0) for plane in rank.planes if plane.group == group)
    return RankGeometry(planes, (Group(rank.groups[group].block_tokens),), rank.share) if planes else None


def _normal(rank: RankGeometry, group: int) -> RankGeometry | None:
    """The same without addresses, devices and gaps: one page of each plane, one behind the other."""
    alone = of_group(rank, group)
    if alone is None:
        return None
    planes: list[Plane] = []
    for plane in alone.planes:
        base = planes[-1].base + planes[-1].page_bytes if planes else BASE
        planes.append(Plane(plane.name, 0, base, plane.page_bytes, plane.page_bytes, 1, plane.parts))
    return RankGeometry(tuple(planes), alone.groups, alone.share)


def topology(ranks: Sequence[RankGeometry], group: int, me: int) -> TransferTopology:
    """Of the ranks that have pages of a group, as one of them reads it."""
    alone = [of_group(rank, group) for rank in ranks]
    place = sum(one is not None for one in alone[:me])
    return TransferTopology([one for one in alone if one is not None], place)


def register(into: TransferTopology, layout: str, manifest: Manifest) -> None:
    """Let a topology read files of a layout; raises `Incompatible` or `LayoutInvalid` with the reason."""
    tokens = into.ranks[0].groups[0].block_tokens
    if len(manifest.info.ranks[0].groups) != 1 or manifest.block_tokens != tokens:
        raise Incompatible(
            f"Blocks of layout {layout[:12]} were to be loaded.",
            f"They have {manifest.block_tokens} tokens each, and ours {tokens}.",
            "Configure one block size on all engines.",
        )
    into.register_remote_engine(EngineTransferInfo(layout, _ANY, manifest.info.ranks))


def write_manifest(folder: Folder, seals: Seals, section: Section) -> None:
    """Say in the folder what files of a section hold, unless that is said; in place of what is damaged."""
    try:
        said = read_manifest(folder, seals, section.layout)
    except DescriptionInvalid:
        said = None
    if said is None:
        mark = section.fingerprint
        folder.put(section.layout, 0, [seals.seal(mark, mark, 0, section.encoded), section.encoded])


def read_manifest(folder: Folder, seals: Seals, layout: str) -> Manifest | None:
    """What files of a layout hold; None if nobody says it. Raises `DescriptionInvalid` if it is not believed."""
    data = folder.get(layout, 0, _LONGEST)
    if data is None:
        return None
    asked, to_do = f"The layout {layout[:12]} of a shared folder was read.", "Remove its file below `layouts`."
    mark = bytes.fromhex(layout)
    cause = seals.refuses(mark, mark, 0, data)
    if cause is not None or len(data) > _LONGEST:
        raise DescriptionInvalid(asked, f"It is not what was written: {cause or 'torn'}.", to_do)
    try:
        found = _DECODE(memoryview(data)[OVERHEAD:])
    except UNREADABLE as error:
        raise DescriptionInvalid(asked, f"It cannot be read: {error}.", to_do) from None
    found.info.check()
    return found
