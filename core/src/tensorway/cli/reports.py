"""Files for what a command found: refused before the work, then written whole or not at all. Room `cli`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tensorway.errors import OptionsInvalid


def writable(path: Path, option: str) -> None:
    """Raise before the work what would be raised after it."""
    try:
        # What is there and is no file, a device or a pipe, is written to; a file is replaced in its folder.
        place = path if path.exists() and not path.is_file() else path.parent
        if path.is_dir() or not path.parent.is_dir() or not os.access(place, os.W_OK):
            raise _unwritable(path, option, "That is a folder, or its folder cannot be written to.")
    except OSError as error:  # its name is too long
        raise _unwritable(path, option, f"The system does not take it: {error.strerror}.") from error


def write(path: Path, content: bytes, option: str) -> None:
    """All of it, or what was there before."""
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        with tempfile.TemporaryDirectory(prefix=".tensorway-", dir=path.parent) as folder:
            Path(folder, "new").write_bytes(content)
            Path(folder, "new").replace(path)
    except OSError as error:
        raise _unwritable(path, option, f"The system does not write it: {error.strerror}.") from error


def _unwritable(path: Path, option: str, true: str) -> OptionsInvalid:
    to_do = f"Give a file in a folder that can be written to: {option} FILE."
    return OptionsInvalid(f"What is found was to be written to {path}.", true, to_do)
