"""Hand-over between real vLLM engines beside vLLM's own NixlConnector: what it costs until the first token.

    python tests/bench/vllm_handover.py [--short] [--only=local,nixl,vllm] [--tokens=256,2048] [--repetitions=N]
        [--layers=N] [--block-size=N] [--scattered] [--core-process] [--json=FILE]

A pair of engines, each in a process, for each way: `local` and `nixl` are TensorwayConnector over these transports,
`vllm` is NixlConnector, all in host memory, and with the same model of random weights. A prompt that nobody has seen
is computed by the first engine of a pair; the second one is asked with the ticket, and then once more, with the prompt
in its own cache. TTFT is of the former, as the second engine sees it; what it takes longer than the latter is the
hand-over. Ways take turns within each repetition, and ratios are of one repetition: the machine is shared, and seconds
of one turn say little about those of another. Who has no turn is stopped: engines with NixlConnector never rest, and
all others would wait for the processors that they hold. Idle is what both engines of a pair use of one processor while
they have nothing to do. Processor time is what the second engine's process used until then, with
all its threads; steps are those of its engine, of which each that computes nothing sleeps a millisecond. `--scattered`
leaves both caches with free blocks in random order first. `--core-process` gives each engine's core a process of its
own, as `vllm serve` does; then processor time is that of the process in front of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import secrets
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

PACKAGES = ("nixl", "nixl_cu12", "nixl_cu13", "nixl_rocm")
#: Of one token of one layer: four heads of 64 numbers of two bytes, keys and values.
HEADS, WIDTH = 4, 64
WORDS = 2000


def missing(way: str) -> str:
    """What is not installed that it needs; empty if all is."""
    found = [name for name in PACKAGES if importlib.util.find_spec(name)]
    if way == "local" or found:
        # vLLM imports the distribution that finds NIXL, not the one that is NIXL.
        return "nixl, which vLLM imports" if way == "vllm" and "nixl" not in found else ""
    return "NIXL"


def asks(way: str) -> dict[str, Any]:
    """What is said to the engine that computes the prompt."""
    if way != "vllm":
        return {"hand_over": True}
    nothing = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
    return {"do_remote_decode": True, "do_remote_prefill": False, **nothing}


def family(process: int) -> list[int]:
    """It, and the processes that it has started, and those that they have."""
    children = " ".join(task.read_text() for task in Path(f"/proc/{process}/task").glob("*/children"))
    return [process, *(each for child in children.split() for each in family(int(child)))]


def used(process: int) -> float:
    """Seconds of processors, by all threads of it."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Pair:
    """Two engines."""

    def __init__(self, way: str, given: argparse.Namespace, folder: Path, address: str, secret: str) -> None:
        from tensorway.testing.servers import free_port
        from tensorway_vllm.testing.deployment import VARIABLES
        from tensorway_vllm.testing.disaggregated import Served, transfer

        self.way = way
        extra = {
            "rendezvous": "direct",
            "rendezvous_options": {"address": address, "secret": secret},
            "options": {"transport": way, "secret": secret, "path": f"/bench/{way}"},
        }
        options = {
            "block_size": given.block_size,
            "max_model_len": max(given.tokens) + 64,
            "kv_cache_memory_bytes": 3 * max(given.tokens) * given.layers * 4 * HEADS * WIDTH,
            "dtype": "bfloat16",
            "load_format": "dummy",
            "hf_overrides": {
                "num_hidden_layers": given.layers,
                "num_key_value_heads": HEADS,
                "num_attention_heads": HEADS,
                "head_dim": WIDTH,
                "max_position_embeddings": 2 * max(given.tokens),
            },
        }
        self.sides = []
        for role in ("producer", "consumer"):
            name = f"{way}-{role}"
            theirs = {"kv_connector": "NixlConnector", "kv_role": f"kv_{role}", "kv_buffer_device": "cpu"}
            kv = {**theirs, "engine_id": name} if way == "vllm" else transfer(name, extra)
            variables = {
                **VARIABLES,
                "HOME": str(folder),
                "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(given.core_process)),
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            }
            self.sides.append(Served(str(folder / "model"), kv, variables, folder / f"{name}.log", **options))

    def idle(self, seconds: float = 2.0) -> float:
        """How many processors its engines keep busy while they have nothing to do."""
        self.resume()
        before = sum(map(used, self._processes()))
        time.sleep(seconds)
        busy = sum(map(used, self._processes())) - before
        self.stop()
        return busy / seconds

    def stop(self) -> None:
        """Take the processors from it."""
        for each in self._processes():
            os.kill(each, signal.SIGSTOP)

    def resume(self) -> None:
        """Give them back."""
        for each in self._processes():
            os.kill(each, signal.SIGCONT)

    def _processes(self) -> list[int]:
        return [each for side in self.sides if side.alive for each in family(side.pid)]

    def scatter(self, numbers: random.Random, tokens: int) -> None:
        """Many requests that end in no order leave free blocks in none."""
        for side in self.sides:
            lengths = [numbers.randrange(16, tokens // 4) for _ in range(48)]
            names = [side.begin([numbers.randrange(4, WORDS) for _ in range(each)], each % 13 + 1) for each in lengths]
            for name in names:
                side.answer(name)

    def turn(self, prompt: list[int]) -> dict[str, float]:
        """One prompt: seconds that computing it takes, TTFT with the ticket, and TTFT with a warm cache."""
        producer, consumer = self.sides
        self.resume()
        first, known = producer.ask(prompt, 1, asks(self.way)), consumer.state()["hits"]
        handed = consumer.ask(prompt, 1, first.params)
        came = consumer.state()["hits"] - known
        warm = consumer.ask(prompt, 1)
        self.stop()
        assert first.tokens == handed.tokens, f"{self.way}: another token was said with the ticket than without"
        assert came >= len(prompt) - 64, f"{self.way}: only {came} tokens of {len(prompt)} came"
        return {
            "computed": first.first,
            "ttft": handed.first,
            "warm": warm.first,
            "processor": handed.processor,
            "steps": handed.steps,
        }


def measured(pairs: list[Pair], given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of tokens and each way."""
    numbers, rows = random.Random(1), []
    if given.scattered:
        for pair in pairs:
            pair.resume()
            pair.scatter(random.Random(2), max(given.tokens))
            pair.stop()
    for tokens in given.tokens:
        turns: list[dict[str, dict[str, float]]] = []
        for number in range(given.repetitions + 2):
            prompt = [numbers.randrange(4, WORDS) for _ in range(tokens)]
            order = pairs[number % len(pairs) :] + pairs[: number % len(pairs)]
            turns.append({pair.way: pair.turn(prompt) for pair in order})
        for pair in pairs:
            rows.append(row(tokens, pair.way, turns[2:]))  # the first ones connect, and find out shapes
            say(rows[-1])
    for pair in pairs:
        print(f"{pair.way}: with nothing to do, both engines use {pair.idle():.2f} processors", flush=True)
    return rows


def row(tokens: int, way: str, turns: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians, and the median, lowest and highest quarter of ratios to NixlConnector."""

    def median(of: Any) -> float:
        return statistics.median(of(turn[way]) for turn in turns)

    made = {
        "tokens": tokens,
        "way": way,
        "computed_ms": 1e3 * median(lambda one: one["computed"]),
        "ttft_ms": 1e3 * median(lambda one: one["ttft"]),
        "handover_ms": 1e3 * median(lambda one: one["ttft"] - one["warm"]),
        "processor_ms": 1e3 * median(lambda one: one["processor"]),
        "steps": median(lambda one: one["steps"]),
    }
    if way != "vllm" and "vllm" in turns[0]:
        for what in ("ttft", "processor"):
            ratios = sorted(turn[way][what] / turn["vllm"][what] for turn in turns)
            made[f"{what}_of_vllm"] = [
                statistics.median(ratios),
                ratios[len(ratios) // 4],
                ratios[-1 - len(ratios) // 4],
            ]
    return made


def say(one: dict[str, Any]) -> None:
    """A line."""
    beside = ""
    if "ttft_of_vllm" in one:
        middle, low, high = one["ttft_of_vllm"]
        beside = f"; of NixlConnector's {middle:.2f} (half of the turns {low:.2f} to {high:.2f})"
        beside += f", and {one['processor_of_vllm'][0]:.2f} of its processor time"
    print(
        f"{one['tokens']:>5} tokens, {one['way']:>5}: TTFT {one['ttft_ms']:7.2f} ms in {one['steps']:g} steps, "
        f"over a warm cache {one['handover_ms']:+7.2f} ms, processor {one['processor_ms']:7.2f} ms, "
        f"computed {one['computed_ms']:7.1f} ms{beside}",
        flush=True,
    )


def numbers_of(text: str) -> list[int]:
    """As many as there are commas, and one."""
    return [int(each) for each in text.split(",")]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", type=lambda text: text.split(","), default=["local", "nixl", "vllm"])
    parser.add_argument("--tokens", type=numbers_of, default=[256, 512, 1024, 2048])
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--scattered", action="store_true")
    parser.add_argument("--core-process", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not importlib.util.find_spec("vllm"):
        print("vLLM is not installed here: nothing to measure. pip install tensorway[vllm], and vLLM for this machine")
        return
    if given.short:
        given.tokens, given.repetitions, given.only = [256, 1024], 5, [way for way in given.only if way != "nixl"]
    lacking = {way: missing(way) for way in given.only}
    for way in filter(lacking.get, lacking):
        print(f"{way}: left out, because {lacking[way]} is not installed here")
    import tensorway
    from tensorway_vllm.testing.tiny import make

    secret = secrets.token_hex(16)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make(folder / "model")
        meeting: Any = tensorway.create("rendezvous", "direct", {"secret": secret})
        stack.callback(meeting.close)
        pairs = []
        for way in given.only:
            if not lacking[way]:
                pairs.append(Pair(way, given, folder, meeting.address, secret))
                for side in pairs[-1].sides:
                    stack.callback(side.close)
                stack.callback(pairs[-1].resume)  # a process that is stopped does not end
                for side in pairs[-1].sides:
                    side.ready()
                pairs[-1].stop()
        rows = measured(pairs, given)
    if given.json:
        described = {name: value for name, value in vars(given).items() if name not in ("json", "short")}
        given.json.write_text(json.dumps({"given": described, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
