"""Opening a shared folder: what must be set, and whether it is there, which nobody waits for longer than they may.

May import the core's errors and this package's folder and options.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from tensorway.errors import DeadlineExceeded, OptionsInvalid
from tensorway_kv.store.folder import Folder
from tensorway_kv.store.options import SharedStoreOptions
from tensorway_kv.store.seals import VERSION

_ASKED: Final = "The connector shared-store was to be opened."


def folders(options: SharedStoreOptions, deadline: float) -> tuple[Folder, Folder]:
    """Where manifests are, and where blocks are; raises what says that the option `folder` names none."""
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
    return Folder(top / "layouts", sync=options.sync), Folder(top / "blocks", sync=options.sync)
