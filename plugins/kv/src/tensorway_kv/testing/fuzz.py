"""Messages and tickets that are nearly right, by a seed, and what must hold for each of them.

    python -m tensorway_kv.testing.fuzz [--seed N] [--count N]

May import the core, its `testing` and this dist. Nothing raises but `TicketInvalid`; what is taken for a message is one
to the byte; a ticket opens as what was issued, or not at all; whatever is refused is counted.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from typing import Any, Final

from tensorway.errors import TicketInvalid
from tensorway.testing.mutations import damaged, reworded
from tensorway_kv import messages, tickets
from tensorway_kv.messages import Ack, Heartbeat, Held, Pushed, PushRegistration, Refusal, Run, Withdraw

_SECRET: Final = "known to engines, and to no client"
_NOW: Final = 1_800_000_000.0
#: The mark of our messages, and their version.
_HEAD: Final = 4
_OTHERS: Final[tuple[Any, ...]] = (None, True, -1, 1.5, 1 << 20_000, "", "\ud800", "é" * 9, [], {"a": [1]}, b"b")

SAMPLES: Final[tuple[messages.Message, ...]] = (
    Heartbeat("decode-0.1", 3, tuple(Held(f"request,{number}:é", number + 1) for number in range(40))),
    Ack("decode-0.1", 3, "r-1", 1 << 40, 5, 2, "received"),
    PushRegistration("decode-0.1", "decode-0", 0, "r-1", 7, ((Run(0, 200), Run(400, 1)), (Run(9, 3),)), 48, 900, 2.5),
    Pushed("prefill-0.1", 65_535, "r" * 512, (1 << 63) - 1),
    Withdraw("decode-0.1", "decode-é", 3, "r-1", 7),
    Refusal("prefill-0.1", 2, "\0\n", 1, "expired"),
)

TICKET: Final = tickets.Ticket(
    engine="prefill-0",
    incarnation="prefill-0.1",
    group="/prod/kv",
    request="cmpl-é,1:2",
    epoch=1 << 50,
    tokens=4000,
    blocks=(tuple(range(0, 500, 2)), (7,)),
    tp=4,
    geometry="ab" * 16,
    issued=_NOW,
    expires=_NOW + 30,
)


def fuzz(seed: int, count: int) -> Counter[str]:
    """How many messages and tickets were refused, and why; `AssertionError` for one that should have been."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    for number in range(count):
        try:
            counts += one_ticket(rng) if number % 4 == 3 else one_message(rng)
        except Exception as error:
            raise AssertionError(f"seed {seed}, number {number}: {type(error).__name__}: {error}") from error
    return counts


def one_message(rng: random.Random) -> Counter[str]:
    """One payload that may be anything: read, or refused and counted."""
    whole = messages.encode(rng.choice(SAMPLES))
    payload: Any = whole
    match rng.randrange(8):
        case 0 | 1 | 2:
            payload = damaged(rng, whole, [messages.encode(other) for other in SAMPLES])
        case 3 | 4 | 5:
            payload = whole[:_HEAD] + reworded(rng, whole[_HEAD:])
        case 6:
            payload = whole[: rng.randrange(len(whole))]
        case _:
            payload = rng.choice((rng.randbytes(rng.randrange(99)), b"\x91" * rng.randrange(70_000), None, "text", 7))
    reader = messages.Reader()
    message = reader.decode(payload)
    if message is not None:
        assert isinstance(message, messages.Message)
        assert message == reader.decode(messages.encode(message)), "what was read can be written"
        assert reader.checked(message, message.sender + "'") is None
    assert sum(reader.refused.values()) == 1, "refused or forged: once"
    return Counter(f"message {cause}" for cause, times in reader.refused.items() if times)


def one_ticket(rng: random.Random) -> Counter[str]:
    """One ticket that somebody on the way has changed."""
    whole = tickets.issue(TICKET, _SECRET)
    given: Any = dict(whole)
    for _ in range(rng.choice((1, 1, 2))):
        field = rng.choice((*whole, *whole, "more"))
        match rng.randrange(6):
            case 0:
                given.pop(field, None)
            case 1:
                given[field] = rng.choice(
                    (None, True, -1, 1.5, 1 << 20_000, "", "\ud800", "é" * 9, [], {"a": [1]}, b"b")
                )
            case 2:
                text = str(whole.get(field, ""))
                given[field] = text[: rng.randrange(len(text) + 1)]
            case _:
                raw = str(whole.get(field, "")).encode(errors="replace")
                given[field] = damaged(rng, raw, [b'"epoch":2', b"[0,1,2]"]).decode(errors="replace")
    if rng.random() < 0.05:
        given = rng.choice((None, [], "ticket", json.dumps(whole), {}, 4))
    try:
        ticket = tickets.open(given, _SECRET, _NOW + 1)
    except TicketInvalid as error:
        refused = error
    else:
        assert ticket == TICKET, "opened, and is not what was issued"
        return Counter(["ticket opened"])
    assert refused.cause in TicketInvalid.CAUSES
    assert len(str(refused).splitlines()) == 3 and _SECRET not in str(refused)
    return Counter([f"ticket {refused.cause}"])


def main() -> None:
    """A campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100_000)
    wanted = parser.parse_args()
    begun = time.monotonic()
    counts = fuzz(wanted.seed, wanted.count)
    lines = [f"{times:9,}  {what}" for what, times in sorted(counts.items())]
    lines.insert(0, f"seed {wanted.seed}: {wanted.count:,} in {time.monotonic() - begun:.0f} s")
    sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
