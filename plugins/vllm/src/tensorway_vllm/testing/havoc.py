"""Random harm to real engines: `python -m tensorway_vllm.testing.havoc [--seed=N] [--count=N] [--transport=NAME]`.

Each round hands a few prompts over between two engines, and kills one, stops one, shouts at their sockets, changes
tickets, gives requests up or takes the rendezvous away while it is done. Every answer must be that of an engine which
computes everything, in time, and afterwards both engines must be at rest. The last line is JSON; it ends with 1 where a
round was not as it must be. May import the core, torch for the model, and vllm in the processes that it starts.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tensorway.errors import TensorwayError
from tensorway_vllm.testing.deployment import HAND_OVER, OPTIONS, Deployment, listening, prompt_of, shout

#: Seconds in which whatever is under way has begun.
_SOON: Final = 0.06
_PROMPTS: Final = 24
_Harm = Callable[["Round"], None]


class Round:
    """A few prompts on their way from one engine to the other."""

    def __init__(self, deployment: Deployment, numbers: random.Random) -> None:
        self.deployment, self.numbers = deployment, numbers
        self.producer, self.consumer = deployment.engines("prefill", "decode")
        seeds = [numbers.randrange(_PROMPTS) for _ in range(numbers.randint(1, 4))]
        self.prompts = [prompt_of(seed, 60 + 33 * seed) for seed in seeds]
        self.count = numbers.choice([1, 8, 40])
        self.expected = [deployment.alone(prompt, self.count, "decode") for prompt in self.prompts]
        names = [self.producer.begin(prompt, 1, HAND_OVER) for prompt in self.prompts]
        self.tickets = [self.producer.answer(name).params for name in names]
        #: Of those that are under way.
        self.names: list[str] = []
        self.aborted: set[str] = set()
        self.cut = False

    def ask(self) -> None:
        """Ask for all of them at the other engine, and wait for a moment."""
        told = zip(self.prompts, self.tickets, strict=True)
        self.names = [self.consumer.begin(prompt, self.count, ticket) for prompt, ticket in told]
        time.sleep(self.numbers.uniform(0.0, _SOON))

    def compare(self) -> int:
        """See that each answer is right; how many there were."""
        if self.cut:
            self.consumer = self.deployment.engine("decode")
            self.ask()
        answers = 0
        for name, expected in zip(self.names, self.expected, strict=True):
            said = self.consumer.answer(name)
            if name in self.aborted and said.reason == "abort":
                continue
            answers += 1
            if said.tokens != expected:
                raise AssertionError(f"{name} was answered with {said.tokens}, and is {expected}")
        for name in ("prefill", "decode"):
            self.deployment.at_rest(name)
        return answers


def _nothing(one: Round) -> None:
    one.ask()


def _kill_consumer(one: Round) -> None:
    one.ask()
    one.consumer.kill()
    one.cut = True


def _kill_producer(one: Round) -> None:
    one.ask()
    one.producer.kill()


def _kill_producer_before(one: Round) -> None:
    one.producer.kill()
    one.ask()


def _stop_producer(one: Round) -> None:
    one.producer.stop()
    one.ask()
    time.sleep(one.numbers.uniform(0.0, 2 * OPTIONS["lease"]))
    one.producer.resume()


def _stop_consumer(one: Round) -> None:
    one.ask()
    one.consumer.stop()
    time.sleep(one.numbers.uniform(0.0, 2 * OPTIONS["lease"]))
    one.consumer.resume()


def _abort(one: Round) -> None:
    one.ask()
    one.aborted = set(one.numbers.sample(one.names, one.numbers.randint(1, len(one.names))))
    for name in one.aborted:
        one.consumer.abort(name)


def _shout(one: Round) -> None:
    one.ask()
    for served in (one.producer, one.consumer):
        shout(listening(served.pid), one.numbers, b"GET / HTTP/1.1\r\n\r\n")


def _forge(one: Round) -> None:
    one.tickets = [_changed(ticket, one.numbers) for ticket in one.tickets]
    one.ask()


def _lose_meeting(one: Round) -> None:
    one.deployment.lose_meeting()
    one.ask()
    time.sleep(one.numbers.uniform(0.0, 2 * OPTIONS["presence"]))
    one.deployment.meet_again()
    time.sleep(2 * OPTIONS["presence"])


def _changed(ticket: Mapping[str, Any] | None, numbers: random.Random) -> dict[str, Any] | None:
    """A letter of it is another, or a part of it is missing."""
    if ticket is None:
        return None
    inner = dict(ticket["tensorway"])
    name = numbers.choice(sorted(inner))
    text = str(inner[name])
    place = numbers.randrange(len(text))
    inner[name] = numbers.choice(
        [None, text[:place], text[:place] + "~" + text[place + 1 :], numbers.randrange(1 << 40)]
    )
    return {"tensorway": inner}


#: What is done, and how often: starting an engine takes far longer than anything else.
HARMS: Final[dict[str, tuple[int, _Harm]]] = {
    "nothing": (3, _nothing),
    "kill the consumer": (2, _kill_consumer),
    "kill the producer": (2, _kill_producer),
    "kill the producer before": (1, _kill_producer_before),
    "stop the producer": (4, _stop_producer),
    "stop the consumer": (5, _stop_consumer),
    "abort": (6, _abort),
    "shout": (2, _shout),
    "forge": (4, _forge),
    "lose the rendezvous": (1, _lose_meeting),
}


def campaign(deployment: Deployment, seed: int, count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """So many rounds; what was done how often, and what was wrong."""
    numbers, done, wrong = random.Random(seed), Counter[str](), []
    answers, began = 0, time.monotonic()
    for number in range(count):
        name = numbers.choices(list(HARMS), [weight for weight, _ in HARMS.values()])[0]
        # Of its own, so that a round can be repeated whatever the ones before it have drawn.
        own = random.Random(f"{seed}-{number}")
        try:
            one = Round(deployment, own)
            HARMS[name][1](one)
            answers += one.compare()
            done[name] += 1
        except (TensorwayError, AssertionError) as error:
            wrong.append(f"round {number}, {name}: {error}")
            say(wrong[-1])
        say(
            f"{number + 1} of {count} rounds, {answers} answers, {len(wrong)} wrong, "
            f"{time.monotonic() - began:.0f} s: {name}"
        )
    return {"rounds": sum(done.values()), "answers": answers, "done": dict(done), "wrong": wrong}


def main() -> int:
    """Do harm, and tell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--transport", default="local")
    given = parser.parse_args()

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory() as folder:
        deployment = Deployment(Path(folder), transport=given.transport)
        try:
            told = campaign(deployment, given.seed, given.count, say)
        finally:
            deployment.close()
    say(json.dumps(told))
    return 1 if told["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
