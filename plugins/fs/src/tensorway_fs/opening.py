"""Opening the tier: which layout, and whether the folder is there, for which nobody waits longer than they may.

May import the core's errors and this dist.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from tensorway.errors import DeadlineExceeded, OptionsInvalid
from tensorway.offload import TierContext
from tensorway_fs.options import FsOptions
from tensorway_fs.plain import FilesTier
from tensorway_fs.tier import SegmentTier

_ASKED: Final = "The tier fs was to be opened."


def open_tier(options: FsOptions, context: TierContext) -> SegmentTier | FilesTier:
    """The tier; raises if `folder` names no folder, or it does not answer."""
    if not options.folder:
        raise OptionsInvalid(_ASKED, "No folder was named.", "Set the option `folder` to one that exists.")
    root, found = Path(options.folder), list[bool]()
    # A file system of another host may not answer; this thread then stays, and nobody waits for it.
    looking = threading.Thread(target=lambda: found.append(root.is_dir()), name="tensorway-fs-folder", daemon=True)
    looking.start()
    looking.join(context.deadline)
    if looking.is_alive():
        true = f"The folder {options.folder} did not answer within {context.deadline:g} s."
        raise DeadlineExceeded(_ASKED, true, "See whether its file system is mounted.")
    if found != [True]:
        raise OptionsInvalid(_ASKED, f"There is no folder {options.folder}.", "Make it, or mount it.")
    return FilesTier(options, context) if options.layout == "files" else SegmentTier(options, context)
