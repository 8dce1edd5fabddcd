"""The tier `object`: see `tensorway.offload.Tier`. May import the core's offload room, and its own package.

One object is one block: whole or not there, found without an index that somebody has to keep, removed alone, and
visible to every engine as soon as it is written. A block that somebody has written is not written again.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from tensorway import settings
from tensorway._logging import logger, warn_once
from tensorway.errors import BackendUnavailable, DeadlineExceeded, TensorwayError, TransferFailed, Unsupported
from tensorway.metrics import Sample
from tensorway.offload import OffloadKey, OfTenant, Outcome, TierCapabilities, TierContext, tenant_of_salt
from tensorway.types import ProbeResult
from tensorway_object import manifest
from tensorway_object.counts import Counts
from tensorway_object.flights import End, Flights
from tensorway_object.frames import HEADER, digest_of, header_of, wrong_with
from tensorway_object.names import Names
from tensorway_object.options import ObjectOptions
from tensorway_object.requests import REMEDIES, TRUE, Requests, Trouble
from tensorway_object.spoiled import Spoiled
from tensorway_object.stores import store_of

_log = logger("object")
#: Objects that are listed, and removed, by one request.
_PAGE: Final = 1000
_TENANT_BYTES: Final = len(tenant_of_salt(""))
#: What a trouble means for a block; of what is not here, that it failed.
_OUTCOMES: Final[Mapping[str, Outcome]] = {"missing": "missing", "full": "full"}
Item = tuple[OffloadKey, memoryview]


class ObjectTier:
    """Threads share it. Construct it with `open`."""

    def __init__(self, store: Any, options: ObjectOptions, context: TierContext) -> None:
        parts = urlsplit(options.url)
        #: Without what nobody else is to know.
        self._where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        self._store, self._options, self._context = store, options, context
        self._names, self._fingerprint = Names(context.fingerprint), digest_of(context.fingerprint)
        self._counts = Counts(context.engine)
        self._requests = Requests(options, self._counts.again)
        self._flights = Flights(options.concurrency)
        self._spoiled = Spoiled()
        #: Whether the store can be told to write only what is not there.
        self._conditional = True
        lasting = parts.scheme != "memory"
        self.capabilities = TierCapabilities(
            persistent=lasting, shared=lasting, writable=options.writable, deletes=options.writable
        )

    @classmethod
    def open(cls, options: ObjectOptions, context: TierContext) -> ObjectTier:
        """See whether the bucket is there and may be used; raises what the operator has to know."""
        tier = cls(store_of(options), options, context)
        try:
            tier._settle(context.deadline)
        except BaseException:
            tier.close(0.0)
            raise
        return tier

    def probe(self, deadline: float) -> ProbeResult:
        """Does what `open` does: what is written then tells whether we may write."""
        try:
            self._settle(deadline)
        except TensorwayError as error:
            return ProbeResult.failed(error.true, error.to_do)
        return ProbeResult.passed(f"{self._where} answers")

    def contains(self, keys: Sequence[OffloadKey], deadline: float) -> list[bool]:
        """What was not answered in time counts as not there; raises if all that was answered is that it failed."""
        found: list[bool | None] = [None] * len(keys)

        async def one(number: int) -> None:
            name = self._names.block(keys[number])
            found[number] = await self._has(name) and name not in self._spoiled

        _, troubles = self._run(one, len(keys), deadline)
        if troubles and all(each is None for each in found):
            raise self._failed(f"which of {len(keys)} blocks it has", troubles[0])
        return [bool(each) for each in found]

    def put(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        """Each block is one upload, which counts when all of it has arrived."""
        self._check_writable("to store blocks")
        return self._each(self._put, items, deadline)

    def get(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        """Into memory of the library's; what is right is copied, on the caller's thread."""
        return self._each(self._get, items, deadline)

    def delete(self, which: Sequence[OffloadKey] | OfTenant, deadline: float) -> int:
        """Of a tenant: all that is listed below its prefix."""
        self._check_writable("to remove blocks")
        if isinstance(which, OfTenant) and len(which.tenant) != _TENANT_BYTES:
            return 0  # no block has it, and a prefix of less is one of all tenants
        names = [] if isinstance(which, OfTenant) else list(dict.fromkeys(map(self._names.block, which)))
        removed = 0

        async def one(number: int) -> None:
            nonlocal removed
            if not isinstance(which, OfTenant):
                gone = await self._has(names[number]) and await self._remove(names[number])
                removed += gone  # read after the wait: others have counted meanwhile
                return
            while paths := await self._page(self._names.tenant(which.tenant)):
                await self._remove(paths)
                removed += len(paths)

        end, troubles = self._run(one, 1 if isinstance(which, OfTenant) else len(names), deadline)
        asked = f"to remove blocks ({removed} are gone)"
        if troubles:
            raise self._failed(asked, troubles[0])
        if end != "done":
            raise self._late(f"The tier object was asked {asked}.", deadline)
        return removed

    def stats(self) -> Sequence[Sample]:
        """What nobody else can count."""
        return self._counts.samples()

    def close(self, deadline: float = 5.0) -> None:
        """Calls that are under way end, and what they have not done has failed."""
        self._flights.close(deadline)

    def name_of(self, key: OffloadKey) -> str:
        """What the object of a block is called, below the URL: for who looks for it there."""
        return self._names.block(key)

    # -- one block

    async def _put(self, key: OffloadKey, block: memoryview) -> Outcome:
        name = self._names.block(key)
        # A copy: what is sent must not change, and what is given up may be read for a while.
        body = b"".join((header_of(key, block, self._fingerprint), block))
        if len(body) < self._options.multipart_bytes:
            await self._write(name, body, again=name in self._spoiled)
        elif name in self._spoiled or not await self._has(name):
            part = self._options.part_bytes
            put = self._store.put_async
            await self._requests.make(lambda: put(name, body, use_multipart=True, chunk_size=part))
        self._spoiled.discard(name)
        return "done"

    async def _get(self, key: OffloadKey, block: memoryview) -> Outcome:
        name, why = self._names.block(key), ""
        for _ in range(2):  # it may have been damaged on its way only
            data, why = await self._requests.make(lambda: self._read(name, HEADER + len(block)))
            why = why or wrong_with(data, key, len(block), self._fingerprint)
            if not why:
                block[:] = data[HEADER:]
                return "done"
        _log.warning("%s of %s is removed: %s.", name, self._where, why)
        self._spoiled.add(name)
        if self._options.writable:
            try:
                await self._remove(name)
                self._spoiled.discard(name)
            except Trouble as trouble:
                self._say(trouble)
        return "corrupt"

    async def _read(self, name: str, nbytes: int) -> tuple[memoryview, str]:
        """What an object holds; of one that has other than so many bytes as much as shows it, and a reason."""
        result = await self._store.get_async(name)
        if (size := result.meta["size"]) != nbytes:
            return memoryview(b""), f"it has {size} bytes, not {nbytes}"
        return memoryview(await result.bytes_async()), ""  # no answer is longer than its head says

    async def _has(self, name: str) -> bool:
        try:
            await self._requests.make(lambda: self._store.head_async(name))
        except Trouble as trouble:
            if trouble.what == "missing":
                return False
            raise
        return True

    async def _write(self, name: str, body: bytes, *, again: bool = False) -> bool:
        """Whether it is there because of this; an object that is there stays, unless it is to be written `again`."""
        put = self._store.put_async
        if self._conditional and not again:
            try:
                await self._requests.make(lambda: put(name, body, mode="create", use_multipart=False))
                return True
            except Trouble as trouble:
                if trouble.what == "there":
                    return False
                if trouble.what != "refused":
                    raise
        await self._requests.make(lambda: put(name, body, use_multipart=False))
        self._conditional = self._conditional and again  # it takes the one and refuses the other
        return True

    async def _remove(self, names: str | Sequence[str]) -> bool:
        try:
            await self._requests.make(lambda: self._store.delete_async(names))
        except Trouble as trouble:
            if trouble.what == "missing":  # somebody else was faster
                return False
            raise
        return True

    async def _page(self, prefix: str) -> list[str]:
        """Names of objects below a prefix, from the first on."""

        async def first() -> list[str]:
            async for page in self._store.list(prefix, chunk_size=_PAGE):
                return [each["path"] for each in page]
            return []

        return await self._requests.make(first)

    # -- many

    def _each(
        self, one: Callable[[OffloadKey, memoryview], Awaitable[Outcome]], items: Sequence[Item], deadline: float
    ) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(items)

        async def each(number: int) -> None:
            key, block = items[number]
            try:
                outcomes[number] = await one(key, block.cast("B"))
            except Trouble as trouble:
                outcomes[number] = _OUTCOMES.get(trouble.what, "failed")
                raise

        end, _ = self._run(each, len(items), deadline)
        left: Outcome = "late" if end == "late" else "failed"
        return [each or left for each in outcomes]

    def _run(self, one: Callable[[int], Awaitable[None]], count: int, deadline: float) -> tuple[End, list[Trouble]]:
        """Do it for all of them; how that ended, and what failed."""
        troubles: list[Trouble] = []

        async def told(number: int) -> None:
            try:
                await one(number)
            except Trouble as trouble:
                if trouble.what != "missing":
                    self._say(trouble)
                    troubles.append(trouble)

        return self._flights.run(told, count, time.monotonic() + deadline), troubles

    def _settle(self, deadline: float) -> None:
        """See that the manifest of our fingerprint is there, and is ours."""
        name, ours = self._names.manifest, manifest.manifest_of(self._context)

        async def one(_number: int) -> None:
            if self._options.writable and await self._write(name, ours):
                return
            # Reading needs what `contains` needs; what is missing is no trouble for who cannot write.
            found = await self._requests.make(lambda: self._manifest(name))
            if not manifest.check(found, self._context, f"{self._where}/{name}") and self._options.writable:
                await self._write(name, ours, again=True)

        asked = f"The tier object was to use {self._where}."
        end, troubles = self._run(one, 1, deadline)
        if troubles:
            what = troubles[0].what
            raise BackendUnavailable(asked, f"{TRUE[what]}: {troubles[0].words}.", REMEDIES[what])
        if end != "done":
            raise self._late(asked, deadline)

    async def _manifest(self, name: str) -> bytes:
        result = await self._store.get_async(name)
        return b"" if result.meta["size"] > manifest.MOST else bytes(await result.bytes_async())

    # -- what went wrong

    def _check_writable(self, asked: str) -> None:
        if not self._options.writable:
            raise Unsupported(
                f"The tier object was asked {asked}.", "Its option writable is false.", "Set it, or ask another tier."
            )

    def _say(self, trouble: Trouble) -> None:
        """Once of each kind and bucket."""
        key = ("object", self._where, trouble.what)
        extra = {"where": self._where, "what": trouble.what}
        warn_once(
            _log,
            key,
            "The tier object at %s: %s: %s. %s",
            self._where,
            TRUE[trouble.what],
            trouble.words,
            REMEDIES[trouble.what],
            rank=settings.local_rank(),
            extra=extra,
        )

    def _failed(self, asked: str, trouble: Trouble) -> TransferFailed:
        return TransferFailed(
            f"The tier object at {self._where} was asked {asked}.",
            f"{TRUE[trouble.what]}: {trouble.words}.",
            REMEDIES[trouble.what],
        )

    def _late(self, asked: str, deadline: float) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{asked.rstrip('.')} (the deadline was {deadline:g} s).",
            f"{self._where} has not answered, or the tier was closed.",
            REMEDIES["failed"],
        )
