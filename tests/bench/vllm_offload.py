"""Offloading in a real vLLM: the scheduler's calls beside vLLM's own manager, and prompts that need not be computed.

    python tests/bench/vllm_offload.py [--short] [--only=calls,prompts] [--tokens=256,2048] [--repetitions=N]
        [--layers=N]

`calls` is what vLLM's scheduler asks of a manager for a request of 64 blocks: each looked up and all loaded, or all
stored, with the completions. Ours is the adapter over `tensorway-cpu`, theirs `CPUOffloadingManager`, both full, and
with new requests each time; CPU microseconds of this thread for each block. They take turns, and ratios are of one
turn. `prompts` is an engine whose model has random weights, its core in a process of its own, as vLLM has it: a new
prompt is computed, vLLM's own cache is reset, and the same prompt comes again from host memory; then once more, from
the cache. Seconds are until the first token, and the ratio is of one prompt's. vLLM's own CPU offloading refuses to run
on a CPU, so nothing is beside it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BLOCKS, CAPACITY = 64, 4096
HEADS, WIDTH, WORDS = 4, 64, 2000


def ours() -> Any:
    """The adapter, as the offloading spec makes it, over a manager of host memory."""
    import tensorway
    from tensorway.offload import OffloadContext
    from tensorway_vllm.offloading.inside import Inside
    from tensorway_vllm.offloading.manager import ManagerAdapter
    from tensorway_vllm.offloading.pages import geometries

    parallel = SimpleNamespace(rank=0, world_size=1, pp_size=1, pcp_size=1, dcp_size=1, tp_size=1)
    groups = [SimpleNamespace(tokens_per_block=16, layer_names=["a"], group_id=0)]
    config = SimpleNamespace(groups=groups, worker_kv_bytes_per_block=4096, parallel=parallel)
    context = OffloadContext("bench", "manager", geometries(config, inside=Inside(1)))
    manager: Any = tensorway.create("offloading", "cpu", {"capacity_blocks": CAPACITY, "pin": False}, context)
    return ManagerAdapter(manager, 1, {0: 0}, events=False)


def theirs() -> Any:
    """vLLM's own."""
    from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

    return CPUOffloadingManager(CAPACITY, "lru")


def _took(call: Callable[[list[Any]], object], keys: list[Any]) -> float:
    began = time.thread_time()
    call(keys)
    return time.thread_time() - began


class Asked:
    """A manager, and requests of it."""

    def __init__(self, manager: Any) -> None:
        self.manager, self._count = manager, 0

    def request(self, keys: list[Any]) -> Any:
        """A new one with these blocks, of which vLLM's scheduler has told."""
        from vllm.v1.kv_offload import base

        self._count += 1
        made = base.ReqContext(req_id=f"r{self._count}")
        for place, key in enumerate(keys):
            made.set_offload_key_position(key, 16 * place)
        self.manager.on_new_request(made)
        return made

    def store(self, keys: list[Any]) -> None:
        """New blocks, for which others go."""
        req = self.request(keys)
        prepared = self.manager.prepare_store(keys, req)
        self.manager.complete_store(set(prepared.keys_to_store), req)
        self._end(req)

    def load(self, keys: list[Any]) -> None:
        """Blocks that are there."""
        req = self.request(keys)
        for key in keys:
            self.manager.lookup(key, req)
        self.manager.prepare_load(keys, req)
        self.manager.complete_load(set(keys), req)
        self._end(req)

    def miss(self, keys: list[Any]) -> None:
        """Blocks of which none is there: the first one is asked for."""
        req = self.request(keys)
        self.manager.lookup(keys[0], req)
        self._end(req)

    def _end(self, req: Any) -> None:
        """The request, and its step."""
        from vllm.v1.kv_offload import base

        self.manager.on_request_finished(req)
        self.manager.on_schedule_end(base.ScheduleEndContext([], []))


def calls(turns: int) -> None:
    """Both managers, by turns."""
    from vllm.v1.kv_offload import base

    def fresh() -> list[Any]:
        return [base.make_offload_key(os.urandom(32), 0) for _ in range(BLOCKS)]

    sides = {"ours": Asked(ours()), "theirs": Asked(theirs())}
    for _ in range(CAPACITY // BLOCKS + 1):
        keys = fresh()
        for side in sides.values():
            side.store(keys)
    found: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in sides} for what in ("store", "load", "miss")
    }
    gc.freeze()  # vLLM's modules are many objects, and a collection among them is no manager's
    for turn in range(turns):
        keys, absent = fresh(), fresh()
        for name in sorted(sides, reverse=bool(turn % 2)):
            side = sides[name]
            found["store"][name].append(_took(side.store, keys))
            found["load"][name].append(_took(side.load, keys))
            found["miss"][name].append(_took(side.miss, absent))
    for what, seconds in found.items():
        each = 1 if what == "miss" else BLOCKS
        mine, its = (1e6 * statistics.median(seconds[name]) / each for name in ("ours", "theirs"))
        ratio = statistics.median(one / other for one, other in zip(seconds["ours"], seconds["theirs"], strict=True))
        of = "request" if what == "miss" else "block"
        print(f"{what:>5}: {mine:6.2f} us a {of}, CPUOffloadingManager {its:6.2f} us, ratio {ratio:5.2f}", flush=True)
    sides["ours"].manager.shutdown()


def serve(given: dict[str, Any]) -> None:
    """In the engine's process: for each length, seconds of prompts computed, loaded and cached."""
    from vllm import SamplingParams

    from tensorway_vllm.testing.engine import engine, hits

    longest = max(given["tokens"])
    page = 32 * given["layers"] * 2 * HEADS * WIDTH * 2
    kv = {
        "kv_connector": "TensorwayOffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"options": {"capacity_bytes": 4 * longest // 32 * page}},
    }
    shape = {"num_key_value_heads": HEADS, "num_attention_heads": HEADS, "head_dim": WIDTH}
    llm = engine(
        given["model"],
        kv,
        max_model_len=longest + 64,
        kv_cache_memory_bytes=3 * longest // 32 * page,
        dtype="bfloat16",
        load_format="dummy",
        hf_overrides={"num_hidden_layers": given["layers"], "max_position_embeddings": 2 * longest, **shape},
    )
    how = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    numbers, found = random.Random(1), []

    def first_token(prompt: list[int]) -> tuple[float, int, list[int]]:
        known, began = hits(llm), time.perf_counter()
        [said] = llm.generate([{"prompt_token_ids": prompt}], how, use_tqdm=False)
        return time.perf_counter() - began, hits(llm) - known, list(said.outputs[0].token_ids)

    for _ in range(given["repetitions"]):
        for tokens in given["tokens"]:
            prompt = [numbers.randrange(4, WORDS) for _ in range(tokens + 5)]
            computed, none, said = first_token(prompt)
            time.sleep(0.05)
            llm.reset_prefix_cache()
            loaded, some, again = first_token(prompt)
            cached, _, _ = first_token(prompt)
            assert (none, some, again) == (0, tokens, said), (none, some, tokens)
            found.append({"tokens": tokens, "computed": computed, "loaded": loaded, "cached": cached})
    llm.llm_engine.engine_core.shutdown()
    sys.stdout.write(f"{json.dumps({'found': found[len(given['tokens']) :] or found})}\n")


def prompts(given: argparse.Namespace) -> None:
    """Start the engine, and say what it has found."""
    from tensorway_vllm.testing.tiny import make

    with tempfile.TemporaryDirectory() as folder:
        plan = {"tokens": given.tokens, "repetitions": given.repetitions, "layers": given.layers}
        plan["model"] = str(make(Path(folder) / "model"))
        environment = {
            **os.environ,
            "HOME": folder,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        command = [sys.executable, __file__, "--serve", json.dumps(plan)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"found"')]
    if not lines:
        raise SystemExit(done.stderr[-3000:])
    rows = json.loads(lines[-1])["found"]
    for tokens in given.tokens:
        some = [row for row in rows if row["tokens"] == tokens]
        middle = {name: 1e3 * statistics.median(row[name] for row in some) for name in ("computed", "loaded", "cached")}
        ratio = statistics.median(row["loaded"] / row["computed"] for row in some)
        print(
            f"{tokens:>5} tokens: first token after {middle['loaded']:7.2f} ms from host memory, "
            f"{middle['computed']:7.2f} computed, {middle['cached']:7.2f} in the cache; ratio {ratio:4.2f}",
            flush=True,
        )


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", type=lambda text: text.split(","), default=["calls", "prompts"])
    parser.add_argument(
        "--tokens", type=lambda text: [int(each) for each in text.split(",")], default=[256, 1024, 2048]
    )
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--serve", type=json.loads)
    given = parser.parse_args()
    if not importlib.util.find_spec("vllm"):
        print("vLLM is not installed here: nothing to measure. pip install tensorway[vllm], and vLLM for this machine")
        return
    if given.serve:
        return serve(given.serve)
    if given.short:
        given.tokens, given.repetitions = [256, 1024], 4
    if "calls" in given.only:
        calls(40 if given.short else 200)
    if "prompts" in given.only:
        prompts(given)


if __name__ == "__main__":
    sys.exit(main())
