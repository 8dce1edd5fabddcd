"""What may come of bytes that somebody else wrote. May import msgspec, so who reads no bytes leaves it alone."""

from __future__ import annotations

from typing import Final

from msgspec import MsgspecError

#: What msgspec raises for bytes that are not what they should be: also for text that is none, and for lists in lists
#: without end. To catch the first one alone is to let a stranger's message end a thread.
UNREADABLE: Final = (MsgspecError, UnicodeDecodeError, RecursionError)
