"""Real vLLMs that generate the same prompts several times: `python -m tensorway_vllm.testing.engine PLANS`.

PLANS is a list in JSON, one engine after the other: `model`, a folder; `kv`, a KVTransferConfig or null; `engine`, more
options of it; `wait`, seconds between rounds; `rounds`, of each what is done before it: `""`, `reset` (the engine's own
cache) or `reset_all` (the connector's, too); `broken`, by the numbers of rounds which calls of the backend raise during
them, such as `CPUManager.lookup`, or `rows`, where every block's load fails; `salts`, by numbers, too. The line that
begins with `[{"start"` tells, in JSON, of each round: tokens, external hits, where cached tokens came from, seconds,
and how many pages are free after it. May import vllm; engines in one process, without a GPU.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

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


def generated(llm: Any, salt: str = "") -> list[list[int]]:
    """What a greedy engine says to the prompts; `salt`: of the tenant who asks."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
    salted = {"cache_salt": salt} if salt else {}
    asked = [{"prompt_token_ids": prompt, **salted} for prompt in prompts()]
    return [list(each.outputs[0].token_ids) for each in llm.generate(asked, how, use_tqdm=False)]


def counted(llm: Any, name: str) -> float:
    """A metric of vLLM's, all its series together, since the engine began."""
    return float(sum(each.value for each in llm.get_metrics() if each.name == name))


def hits(llm: Any) -> int:
    """Tokens that were loaded, since the engine began."""
    return int(counted(llm, "vllm:external_prefix_cache_hits"))


def sources(llm: Any) -> Counter[str]:
    """Where cached tokens came from, since the engine began; nothing, if vLLM is too old to say it."""
    name = "vllm:prompt_tokens_cached_by_source"
    return Counter({each.labels["source"]: int(each.value) for each in llm.get_metrics() if each.name == name})


def free(llm: Any) -> int | None:
    """Pages that no request has; None if the engine is in another process."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    return None if core is None else int(core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


@contextmanager
def broken(calls: list[str]) -> Iterator[None]:
    """Calls of the backend in this process raise, or, for `rows`, are of rows that there are not."""
    from tensorway_cpu.common import CPULoadStoreSpec
    from tensorway_cpu.manager import CPUManager
    from tensorway_cpu.worker import CPUWorker

    whole = CPUWorker.load

    def load(self: CPUWorker, job: int, source: Any, target: Any) -> None:
        whole(self, job, CPULoadStoreSpec.of([-1] * len(source)), target)

    with ExitStack() as all_of_them:
        for call in calls:
            owner, _, name = call.partition(".")
            if call == "rows":
                patch = mock.patch.object(CPUWorker, "load", load)
            else:
                patch = mock.patch.object(
                    {"CPUManager": CPUManager, "CPUWorker": CPUWorker}[owner], name, _raising(name)
                )
            all_of_them.enter_context(patch)
        yield


def _raising(name: str) -> Any:
    def raising(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken by a test")

    raising.__name__ = name
    return raising


def carried_out(plan: dict[str, Any]) -> dict[str, Any]:
    """One engine's rounds."""
    began = time.perf_counter()
    llm = engine(plan["model"], plan["kv"], **plan.get("engine", {}))
    told: dict[str, Any] = {"start": time.perf_counter() - began, "rounds": []}
    for number, before in enumerate(plan["rounds"]):
        if before:
            time.sleep(plan.get("wait", 0.0))
            llm.reset_prefix_cache(reset_connector=before == "reset_all")
        with broken(plan.get("broken", {}).get(str(number), [])):
            known, cached, began = hits(llm), sources(llm), time.perf_counter()
            tokens = generated(llm, plan.get("salts", {}).get(str(number), ""))
            seconds = time.perf_counter() - began
        told["rounds"].append(
            {
                "tokens": tokens,
                "hits": hits(llm) - known,
                "sources": sources(llm) - cached,
                "seconds": seconds,
                "free": free(llm),
            }
        )
    time.sleep(plan.get("wait", 0.0))
    llm.llm_engine.engine_core.shutdown()
    return told


if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps([carried_out(plan) for plan in json.loads(sys.argv[1])])}\n")
    sys.stdout.flush()
