"""Every exception that tensorway raises on purpose: one class per situation, three lines each.

Ground: imports nothing of tensorway, so that every room and every plugin may import it.
"""

from __future__ import annotations


class TensorwayError(Exception):
    """Something that was asked for cannot be done; the text says what, why, and what to do about it."""

    def __init__(self, asked: str, true: str, to_do: str) -> None:
        # Words of a server, a file or a client may be in them, and all three may be printed or logged apart.
        asked, true, to_do = harmless(asked), harmless(true), harmless(to_do)
        # All three go to Exception.args, so that the error survives pickling between processes.
        super().__init__(asked, true, to_do)
        #: What was asked, in the caller's words.
        self.asked = asked
        #: What is true instead.
        self.true = true
        #: What the reader can do next.
        self.to_do = to_do

    def __str__(self) -> str:
        # A line of a stranger's words does not begin as one of a log does.
        return "\n  ".join(line.replace("\n", "\n    ") for line in (self.asked, self.true, self.to_do))


def harmless(text: str) -> str:
    """Text with whatever a terminal would obey spelled out; only ends of lines and tabs stay as they are."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)


class BackendNotFound(TensorwayError, LookupError):
    """No installed plugin offers a backend of this name."""


class BackendConflict(TensorwayError, LookupError):
    """Two dists offer a backend of the same name, and the request does not say which one is meant."""


class BackendUnavailable(TensorwayError, RuntimeError):
    """The backend is installed, but it cannot be used on this machine or for this request."""


class PluginDefect(TensorwayError, RuntimeError):
    """A plugin is broken (not merely unusable here), and strict mode does not go on without it."""


class OptionsInvalid(TensorwayError, ValueError):
    """The options given to a backend do not fit the options that it declares."""


class SettingInvalid(TensorwayError, ValueError):
    """An environment variable that tensorway reads holds something that it cannot mean."""


class OfferInvalid(TensorwayError, TypeError):
    """What a plugin offers does not satisfy the contract of the hook that it offers it for."""


class HostBusy(TensorwayError, TimeoutError):
    """Another thread has been loading a plugin for longer than the deadline."""


class NewPluginRefused(TensorwayError, ValueError):
    """`tensorway new-plugin` was asked for something that it will not write."""


class MemoryInvalid(TensorwayError, ValueError):
    """Memory that was given cannot be what it is given for: not contiguous, not registered, out of range."""


class DescriptionInvalid(TensorwayError, ValueError):
    """What should describe a peer does not: damaged, foreign, or of another transport."""


class DeadlineExceeded(TensorwayError, TimeoutError):
    """Something did not happen in the time that it was given."""


class PeerLost(TensorwayError, ConnectionError):
    """The peer was killed, closed, restarted, or cannot be reached any more."""

    @classmethod
    def because(cls, asked: str, reason: str) -> PeerLost:
        """The error for a peer that was there, and why it is not any more."""
        return cls(asked, f"The peer is lost: {reason}.", "Connect to it anew when it is back.")


class TransferFailed(TensorwayError, OSError):
    """The fabric could not move the bytes, and the peer is still there."""


class TransferCancelled(TensorwayError, RuntimeError):
    """The transfer was cancelled by who started it."""


class Unsupported(TensorwayError, NotImplementedError):
    """The backend does not have the capability that was asked of it, and said so."""


class Closed(TensorwayError, RuntimeError):
    """The object was closed, or belongs to the process that this one was forked from."""


class AddressInvalid(TensorwayError, ValueError):
    """An address cannot be listened on, or a policy for choosing one has no single answer on this host."""


class Unauthenticated(TensorwayError, PermissionError):
    """The secret is missing, too short, or not the one that the other side knows."""


class RecordRefused(TensorwayError, ValueError):
    """A rendezvous will not hold, change or return a record: too large, no key, or changed by somebody else."""

    @classmethod
    def changed(cls, key: str, expected: int, revision: int) -> RecordRefused:
        """The error for a record that is at another revision than its writer expected."""
        return cls(
            f"{key} was to be changed at revision {expected}.",
            f"It is at revision {revision}: somebody else changed it.",
            "Read it again, and decide again.",
        )


class LeaseLost(TensorwayError, RuntimeError):
    """A lease ended: its holder did not keep it in time, or the store was restarted."""

    @classmethod
    def ended(cls, asked: str) -> LeaseLost:
        """The error for a lease that the store does not know any more."""
        return cls(asked, "The lease has ended.", "Take a new lease, and put your records again.")


class Incompatible(TensorwayError, ValueError):
    """Two members of a deployment differ in a fact in which they must agree."""


class LayoutInvalid(TensorwayError, ValueError):
    """Weights that cannot be moved row by row: broadcast, not contiguous, or not one row for each slot."""


class PlacementInvalid(TensorwayError, ValueError):
    """A placement that no group can have, or a file of one that is damaged."""


class ExpertLost(TensorwayError, LookupError):
    """Nobody holds an expert any more, and there is no copy of it to load."""


class StagingFull(TensorwayError, MemoryError):
    """More rows were to arrive at once than the staging memory has room for."""


class Excluded(TensorwayError, RuntimeError):
    """The other members went on without this one."""


class TicketInvalid(TensorwayError, ValueError):
    """What a request brought to have its blocks handed over is no ticket, or none that may be used here and now."""

    #: Everything that `cause` can be, for who counts.
    CAUSES = ("forged", "expired", "truncated", "foreign", "malformed", "replayed")

    def __init__(self, asked: str, true: str, to_do: str, cause: str = "malformed") -> None:
        super().__init__(asked, true, to_do)
        #: Why it was refused, in one word.
        self.cause = cause
