"""Which backend: a pure function of what is known and what is asked, with a reason for every one that loses.

Room `plugins`; may import the ground. Nothing here loads, probes or logs; the host does that and asks again. What
`tensorway why` prints is a `Decision`, and so is what a construction follows: there is no second opinion anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from tensorway.plugins.scan import canonical
from tensorway.types import Offer, ProbeResult

AUTO: Final = "auto"


@attrs.frozen
class Request:
    """What somebody wants."""

    kind: str
    #: A backend's name, or `auto` for the best that is usable here.
    name: str = AUTO
    #: Only from this dist (`name@dist`), empty for any.
    dist: str = ""
    #: Memory that it must address, empty for any.
    device: str = ""
    #: Capabilities that it must have.
    needs: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, kind: str, name: str, device: str = "", needs: frozenset[str] = frozenset()) -> Request:
        """Read `name` or `name@dist`."""
        bare, _, dist = name.partition("@")
        return cls(kind, bare, canonical(dist), device, needs)

    @property
    def label(self) -> str:
        """`name`, or `name@dist` when the dist matters."""
        return f"{self.name}@{self.dist}" if self.dist else self.name

    def __str__(self) -> str:
        wants = [f"on {self.device}"] if self.device else []
        wants += [f"with {', '.join(sorted(self.needs))}"] if self.needs else []
        return " ".join([self.kind, self.label, *wants])


@attrs.frozen
class Candidate:
    """What is known about one backend of the kind. Unknown is None: an offer not loaded, a probe not asked."""

    name: str
    dist: str
    offer: Offer | None = None
    probe: ProbeResult | None = None
    #: Why it is out, when loading or probing it ended badly or somebody denied it.
    stopped: str = ""
    remedy: str = ""

    @property
    def label(self) -> str:
        """`name@dist`."""
        return f"{self.name}@{self.dist}"


@attrs.frozen
class Loser:
    """A candidate that was not chosen, and why."""

    candidate: Candidate
    reason: str
    remedy: str = ""


@attrs.frozen
class Decision:
    """The answer to a request. At most one of `winner` and `ask_next` is set."""

    request: Request
    winner: Candidate | None
    losers: tuple[Loser, ...]
    #: The candidate that wins if its probe passes: ask it and decide again.
    ask_next: Candidate | None = None


def decide(request: Request, candidates: Sequence[Candidate]) -> Decision:
    """Choose. The order of `candidates` does not matter; ties of priority go to the lower name."""
    asked, losers = _asked_for(request, candidates)
    fit: list[Candidate] = []
    for candidate in asked:
        obstacle = _obstacle(request, candidate, asked)
        if obstacle is None:
            fit.append(candidate)
        else:
            losers.append(obstacle)
    fit.sort(key=_rank)
    best = fit[0] if fit else None
    for other in fit[1:]:
        losers.append(Loser(other, _outranked(other, best)))
    decided = best is not None and best.probe is not None
    return Decision(
        request,
        winner=best if decided else None,
        losers=tuple(sorted(losers, key=lambda loser: (loser.candidate.name, loser.candidate.dist))),
        ask_next=None if decided else best,
    )


def _asked_for(request: Request, candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Loser]]:
    asked, losers = [], []
    for candidate in candidates:
        if request.name not in (AUTO, candidate.name):
            losers.append(Loser(candidate, f"{request.name!r} was asked for by name"))
        elif request.dist not in ("", candidate.dist):
            losers.append(Loser(candidate, f"it was asked for from {request.dist}"))
        else:
            asked.append(candidate)
    return asked, losers


def _obstacle(request: Request, candidate: Candidate, asked: Sequence[Candidate]) -> Loser | None:
    """The first thing that keeps a candidate out, in the order in which a person would want to hear of it."""
    if candidate.stopped:
        return Loser(candidate, candidate.stopped, candidate.remedy)
    twins = [other.label for other in asked if other.name == candidate.name and not other.stopped]
    if len(twins) > 1:
        return Loser(candidate, f"{len(twins)} dists offer this name", f"Ask for one of: {', '.join(sorted(twins))}.")
    offer = candidate.offer
    if offer is None:
        return Loser(candidate, "it has not been loaded")
    if offer.factory is None:
        return Loser(
            candidate,
            "it reports what is here and constructs nothing yet",
            f"A later release of {candidate.dist} constructs it.",
        )
    if request.device and request.device not in offer.devices:
        return Loser(candidate, f"it serves {', '.join(sorted(offer.devices)) or 'no device'}, not {request.device}")
    if missing := request.needs - offer.capabilities:
        return Loser(candidate, f"it lacks {', '.join(sorted(missing))}")
    if candidate.probe is not None and not candidate.probe.usable:
        return Loser(candidate, candidate.probe.reason, candidate.probe.remedy)
    return None


def _rank(candidate: Candidate) -> tuple[int, str, str]:
    assert candidate.offer is not None, "a candidate without an offer has an obstacle"
    return (-candidate.offer.priority, candidate.name, candidate.dist)


def _outranked(other: Candidate, best: Candidate | None) -> str:
    assert other.offer is not None and best is not None and best.offer is not None
    mine, its = other.offer.priority, best.offer.priority
    if mine == its:
        return f"{best.name} has the same priority {its} and comes first by name"
    return f"priority {mine}; {best.name} has {its}"
