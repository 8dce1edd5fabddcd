"""A real vLLM that generates the same prompts several times: `python -m tensorway_vllm.testing.engine PLAN`.

PLAN is JSON: `model`, a folder; `kv`, a KVTransferConfig or null; `rounds`, what is done before each round: `""`,
`reset` (the engine's own cache) or `reset_all` (the connector's, too); `fail`, a round in which every block's load
fails, or null; `wait`, seconds between rounds. The line that begins with `{"start"` tells, in JSON, tokens, external
hits and seconds of each round. May import vllm; an engine in one process, without a GPU.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

PROMPTS, TOKENS, ANSWER, SEED = 3, 300, 16, 1


def prompts() -> list[list[int]]:
    """Of unequal lengths, the same ones in each process."""
    numbers = random.Random(SEED)
    return [[numbers.randrange(4, 2000) for _ in range(TOKENS + 7 * place)] for place in range(PROMPTS)]


def engine(model: str, kv: dict[str, Any] | None, **more: Any) -> Any:
    """An engine with little memory, in this process."""
    from vllm import LLM

    options: dict[str, Any] = {
        "block_size": 32,
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 32 << 20,
        "dtype": "float32",
        **more,
    }
    return LLM(
        model=model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        seed=0,
        enable_prefix_caching=True,
        disable_log_stats=False,
        kv_transfer_config=kv,
        **options,
    )


def generated(llm: Any) -> list[list[int]]:
    """What a greedy engine says to the prompts."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts()]
    return [list(each.outputs[0].token_ids) for each in llm.generate(asked, how, use_tqdm=False)]


def hits(llm: Any) -> int:
    """Tokens that were loaded, since the engine began."""
    return int(sum(each.value for each in llm.get_metrics() if each.name == "vllm:external_prefix_cache_hits"))


def break_loads() -> Any:
    """From now on loads in this process fail, all of them; returns what undoes it."""
    from tensorway_cpu.worker import CPUWorker

    whole = CPUWorker.load

    def broken(self: CPUWorker, job: int, source: Any, target: Any) -> None:
        """There is no such row."""
        from tensorway_cpu.common import CPULoadStoreSpec

        whole(self, job, CPULoadStoreSpec.of([-1] * len(source)), target)

    CPUWorker.load = broken  # type: ignore[method-assign]

    def undo() -> None:
        CPUWorker.load = whole  # type: ignore[method-assign]

    return undo


def main(plan: dict[str, Any]) -> dict[str, Any]:
    """Carry the plan out."""
    began = time.perf_counter()
    llm = engine(plan["model"], plan["kv"], **plan.get("engine", {}))
    told: dict[str, Any] = {"start": time.perf_counter() - began, "rounds": []}
    for number, before in enumerate(plan["rounds"]):
        if before:
            time.sleep(plan.get("wait", 0.0))
            llm.reset_prefix_cache(reset_connector=before == "reset_all")
        undo = break_loads() if plan.get("fail") == number else None
        known, began = hits(llm), time.perf_counter()
        tokens = generated(llm)
        seconds = time.perf_counter() - began
        if undo is not None:
            undo()
        told["rounds"].append({"tokens": tokens, "hits": hits(llm) - known, "seconds": seconds})
    time.sleep(plan.get("wait", 0.0))
    llm.llm_engine.engine_core.shutdown()
    return told


if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps(main(json.loads(sys.argv[1])))}\n")
    sys.stdout.flush()
