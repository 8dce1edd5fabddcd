"""Opening a shared folder: what must be set, and whether it is there, which nobody waits for longer than they may.

May import the core's errors, msgspec and this package's folder and options.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from tensorway.errors import DeadlineExceeded, OptionsInvalid
from tensorway_kv.store.folder import Folder
from tensorway_kv.store.options import SharedStoreOptions
from tensorway_kv.store.seals import VERSION, Seals

_ENCODE: Final = msgspec.msgpack.Encoder().encode
_ASKED: Final = "The connector shared-store was to be opened."


def folders(
    options: SharedStoreOptions, facts: Mapping[str, str], seals: Seals, deadline: float
) -> tuple[Folder, Folder]:
    """Where manifests of engines with these facts are, and where blocks are; raises if `folder` names no folder."""
    if not options.folder:
        to_do = "Set the option `folder` to one that all engines see."
        raise OptionsInvalid(_ASKED, "No folder was named.", to_do)
    root, found = Path(options.folder), list[bool]()
    # A folder of another host may not answer; this thread then stays, and nobody waits for it.
    looking = threading.Thread(target=lambda: found.append(root.is_dir()), name="tensorway-kv-folder", daemon=True)
    looking.start()
    looking.join(deadline)
    if looking.is_alive():
        true = f"The folder {options.folder} did not answer within {deadline:g} s."
        raise DeadlineExceeded(_ASKED, true, "See whether its file system is mounted, and its host is there.")
    if found != [True]:
        raise OptionsInvalid(_ASKED, f"There is no folder {options.folder}.", "Make it, or mount it, on every host.")
    top = root / f"v{VERSION}"
    same = seals.fingerprint(_ENCODE(sorted(facts.items()))).hex()
    return Folder(top / "layouts" / same, sync=options.sync), Folder(top / "blocks", sync=options.sync)
