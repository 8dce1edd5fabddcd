"""What an operator wants to be rid of, and removing it beside engines that run. May import the core and this dist.

A segment goes as a whole, if nobody writes it, which its lock says; a tenant's blocks are marked dead in any.
"""

from __future__ import annotations

import argparse
import re
import time
from typing import Final

import attrs

from tensorway.errors import OptionsInvalid
from tensorway.offload import OffloadKey, key_tenant, tenant_of_salt
from tensorway_fs.command.survey import Survey, surveys
from tensorway_fs.namespace import Root
from tensorway_fs.segment import bury, claimed

_TENANT: Final = re.compile(r"[0-9a-f]{16}|none", re.ASCII)
_SPACE: Final = re.compile(r"[0-9a-f]{4,32}", re.ASCII)
_NONE: Final = bytes(8)


@attrs.frozen
class Which:
    """What is selected; of several selections of segments, what any of them selects."""

    space: str = ""
    max_bytes: int | None = None
    older: float | None = None
    tenant: bytes | None = None
    damaged: bool = False

    @classmethod
    def of(cls, given: argparse.Namespace) -> Which:
        """From the command line; raises `OptionsInvalid`."""
        asked, see = "Blocks were to be removed.", "See tensorway offload gc --help."
        if given.tenant is not None and given.salt is not None:
            raise OptionsInvalid(asked, "Both a tenant and a salt were given.", "Give one of them.")
        if given.tenant is not None and not _TENANT.fullmatch(given.tenant):
            raise OptionsInvalid(asked, f"{given.tenant[:40]!r} is no tenant.", "Give one that `stat` lists.")
        if given.space is not None and not _SPACE.fullmatch(given.space):
            raise OptionsInvalid(asked, f"{given.space[:40]!r} is no fingerprint.", "Give 4 to 32 digits of it.")
        if (given.max_bytes or 0) < 0 or not 0 <= (given.older or 0) < float("inf"):
            raise OptionsInvalid(asked, "A number is less than nothing.", see)
        tenant = None
        if given.salt is not None:
            tenant = tenant_of_salt(given.salt)
        elif given.tenant is not None:
            tenant = _NONE if given.tenant == "none" else bytes.fromhex(given.tenant)
        which = cls(given.space or "", given.max_bytes, given.older, tenant, given.damaged)
        if which == cls():
            raise OptionsInvalid(asked, "Nothing was selected.", see)
        return which

    @property
    def whole_space(self) -> bool:
        """Whether nothing but a fingerprint is selected."""
        return bool(self.space) and self == Which(self.space)


@attrs.define
class Done:
    """What was removed."""

    segments: int = 0
    blocks: int = 0
    nbytes: int = 0
    #: Segments that were selected and are being written.
    kept: int = 0


def remove(root: Root, which: Which, *, dry: bool) -> Done:
    """Remove it."""
    done = Done()
    found = [survey for survey in surveys(root) if survey.named.space.startswith(which.space)]
    if which.tenant is not None:
        for survey in found:
            _remove_tenant(survey, which.tenant, done, dry=dry)
    over = sum(survey.nbytes for survey in found) - which.max_bytes if which.max_bytes is not None else 0
    for survey in found:
        if (over > 0 or _is_selected(survey, which)) and _remove_segment(survey, done, dry=dry):
            over -= survey.nbytes
    return done


def _is_selected(survey: Survey, which: Which) -> bool:
    if which.whole_space or (which.damaged and survey.problem):
        return True
    last = survey.last() if which.older is not None else None
    return which.older is not None and (last is None or time.time() - last > which.older)


def _remove_segment(survey: Survey, done: Done, *, dry: bool) -> bool:
    """Whether it is gone, or would be."""
    try:
        with claimed(survey.disk, survey.named) as free:
            if not free:
                done.kept += 1
                return False
            if not dry:
                survey.disk.unlink(survey.named.path)
    except FileNotFoundError:
        return True
    except OSError:  # a link, or a folder: none of ours
        done.kept += 1
        return False
    done.segments += 1
    done.blocks += survey.blocks
    done.nbytes += survey.nbytes
    return True


def _remove_tenant(survey: Survey, tenant: bytes, done: Done, *, dry: bool) -> None:
    places = [
        place for place, found in survey.entries() if found is not None and key_tenant(OffloadKey(found.key)) == tenant
    ]
    if not places:
        return
    if not dry:
        try:
            bury(survey.disk, survey.named.path, places, sync=True)
        except FileNotFoundError:
            return  # an engine has removed it meanwhile
    done.blocks += len(places)
    if len(places) == survey.blocks and survey.state.sealed:
        rest = Done()
        _remove_segment(survey, rest, dry=dry)
        done.segments += rest.segments
        done.nbytes += rest.nbytes
