"""Real engines in processes of their own, which are asked, stopped and killed.

`Served` is this side; its process runs an engine as vLLM's own loop does, takes requests at any time, and gives them up
when it is told to. May import vllm in the processes that it starts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Final

import attrs

from tensorway.errors import DeadlineExceeded, PeerLost

#: Seconds in which an engine starts, and in which it answers, on a machine that does much else.
START, ANSWER = 300.0, 120.0
#: What vLLM's loop sleeps after a step that computed nothing.
_YIELD: Final = 1e-3
_IDLE: Final = 0.05


def transfer(name: str, extra: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A KVTransferConfig with our connector, which computes what cannot be loaded."""
    return {
        "kv_connector": "TensorwayConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "engine_id": name,
        "kv_connector_extra_config": dict(extra),
        **more,
    }


@attrs.frozen
class Answer:
    """What became of a request."""

    tokens: list[int]
    #: Why it ended, as vLLM says it.
    reason: str
    #: What the next engine needs.
    params: dict[str, Any] | None
    #: Seconds until the first token, and until the end, as its engine has seen them.
    first: float
    seconds: float
    #: Until the first token: what its engine's process used of processors, and how many steps the engine took.
    processor: float = 0.0
    steps: int = 0


@attrs.frozen
class _Clocks:
    """When something was, by several."""

    wall: float
    processor: float
    steps: int


class Served:
    """An engine in a process: this side."""

    def __init__(
        self,
        model: str,
        kv: Mapping[str, Any] | None,
        variables: Mapping[str, str],
        log: Path,
        **options: Any,
    ) -> None:
        """`kv`: a KVTransferConfig, or nothing; `variables`: of its environment, beside ours; `log`: what it prints;
        `options`: of vLLM's engine."""
        self._log, self._number = log, 0
        self._link, other = Pipe()
        self._begun: set[str] = set()
        self._answers: dict[str, Answer] = {}
        self._said: list[Any] = []
        # `env` becomes the interpreter: what its environment is beyond ours stands in the command.
        command = ["env", *(f"{name}={value}" for name, value in variables.items())]
        command += [sys.executable, "-m", __name__, str(other.fileno())]
        with log.open("ab") as out, other:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, pass_fds=[other.fileno()])
        self._link.send({"model": model, "kv": kv, "options": options})

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def ready(self, deadline: float = START) -> Served:
        """Wait until it takes requests."""
        self._said_by("ready", deadline)
        return self

    # -- requests

    def begin(self, prompt: list[int], count: int, params: Mapping[str, Any] | None = None) -> str:
        """Ask, and do not wait; the request's name."""
        self._number += 1
        name = f"r{self._number}"
        self._link.send(("ask", name, prompt, count, dict(params) if params else None))
        return name

    def began(self, name: str, deadline: float = ANSWER) -> None:
        """Wait for its first token."""
        self._hear(lambda: name in self._begun or name in self._answers, f"the first token of {name}", deadline)

    def answer(self, name: str, deadline: float = ANSWER) -> Answer:
        """Wait for its end."""
        self._hear(lambda: name in self._answers, f"the answer to {name}", deadline)
        return self._answers.pop(name)

    def ask(
        self, prompt: list[int], count: int, params: Mapping[str, Any] | None = None, deadline: float = ANSWER
    ) -> Answer:
        """Ask, and wait."""
        return self.answer(self.begin(prompt, count, params), deadline)

    def abort(self, name: str) -> None:
        """Give a request up, as for a client that has hung up."""
        self._link.send(("abort", name))

    # -- the engine

    def forget(self) -> None:
        """Empty the engine's own cache."""
        self._link.send(("forget",))
        self._said_by("forgot", ANSWER)

    def state(self, deadline: float = ANSWER) -> dict[str, Any]:
        """`free` blocks, `requests` that the scheduler knows, external `hits` in tokens, and other `metrics`."""
        self._link.send(("state",))
        state: dict[str, Any] = self._said_by("state", deadline)
        return state

    def settled(self, free: int, deadline: float) -> dict[str, Any]:
        """Wait until it knows no request and has so many free blocks; the last state, whatever it was by then."""
        until = time.monotonic() + deadline
        while True:
            state = self.state(deadline + ANSWER)
            if (state["free"] == free and not state["requests"]) or time.monotonic() >= until:
                return state
            time.sleep(0.05)

    # -- its process

    def stop(self) -> None:
        """It stands still from now on."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """As a machine that loses its power."""
        self._process.kill()
        self._process.wait(30.0)
        self._link.close()

    def close(self, deadline: float = 60.0) -> int | None:
        """End it; with what its process ended, None if it had to be killed."""
        if self.alive and not self._link.closed:
            self.resume()
            self._link.send(("end",))
            try:
                return self._process.wait(deadline)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(30.0)
                return None
            finally:
                self._link.close()
        return self._process.wait(30.0)

    # -- inside

    def _said_by(self, what: str, deadline: float) -> Any:
        def said() -> bool:
            return any(word == what for word, _ in self._said)

        self._hear(said, what, deadline)
        found = next(pair for pair in self._said if pair[0] == what)
        self._said.remove(found)
        return found[1]

    def _hear(self, enough: Any, what: str, deadline: float) -> None:
        until = time.monotonic() + deadline
        asked = f"An engine was asked for {what}."
        while not enough():
            try:
                if not self._link.poll(max(0.0, until - time.monotonic())):
                    true = f"It said nothing for {deadline:g} s. Its log ends with:\n{self.log[-2000:]}"
                    raise DeadlineExceeded(asked, true, "Look at its log.")
                word, *rest = self._link.recv()
            except (EOFError, ConnectionError):
                self._process.wait(30.0)  # its end of the connection is closed before it has ended
                true = f"Its process ended. Its log ends with:\n{self.log[-3000:]}"
                raise PeerLost(asked, true, "Look at its log.") from None
            if word == "began":
                self._begun.add(rest[0])
            elif word == "answer":
                self._answers[rest[0]] = Answer(**rest[1])
            else:
                self._said.append((word, rest[0] if rest else None))


# -- the side of the engine


class Serving:
    """The engine, and what it was asked."""

    def __init__(self, link: Connection, plan: Mapping[str, Any]) -> None:
        from tensorway_vllm.testing.engine import engine

        self._link, self._ended = link, False
        self._llm = engine(plan["model"], plan["kv"] or None, **plan["options"])
        self._engine = self._llm.llm_engine
        #: None where the engine's core is in a process of its own, with a loop of its own.
        self._core = getattr(self._engine.engine_core, "engine_core", None)
        #: Of each request under way: its name inside, and the clocks when it came; and when its first token did.
        self._asked: dict[str, tuple[str, _Clocks]] = {}
        self._first: dict[str, _Clocks] = {}
        self._steps = 0
        link.send(("ready",))

    def run(self) -> None:
        """Until it is told to end, or nobody is there to tell it."""
        while not self._ended:
            busy = bool(self._asked) or (self._core is not None and self._core.scheduler.has_requests())
            try:
                while self._link.poll(0.0 if busy else _IDLE):
                    self._do(*self._link.recv())
                    busy = True
            except (EOFError, ConnectionError):
                break
            if busy and not self._ended:
                self._step()
        self._engine.engine_core.shutdown()

    def _do(self, what: str, *rest: Any) -> None:
        if what == "ask":
            self._ask(*rest)
        elif what == "abort":
            self._abort(rest[0])
        elif what == "forget":
            self._llm.reset_prefix_cache()
            self._link.send(("forgot",))
        elif what == "state":
            self._link.send(("state", self._state()))
        else:
            self._ended = True

    def _ask(self, name: str, prompt: list[int], count: int, params: dict[str, Any] | None) -> None:
        from vllm import SamplingParams

        extra = {"kv_transfer_params": params} if params else None
        how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, extra_args=extra)
        came = self._clocks()
        inside = self._engine.add_request(name, {"prompt_token_ids": prompt}, how)
        self._asked[name] = inside, came

    def _abort(self, name: str) -> None:
        inside, came = self._asked.pop(name, ("", self._clocks()))
        if inside:
            self._engine.abort_request([inside], internal=True)
            self._answer(name, [], "abort", None, came)

    def _step(self) -> None:
        if self._core is None and not self._asked:
            return  # its own loop does what is left
        self._steps += 1
        outputs = self._engine.step()
        for output in outputs:
            self._heard(output)
        if not outputs and self._core is not None and self._core.scheduler.has_requests():
            time.sleep(_YIELD)

    def _heard(self, output: Any) -> None:
        name, [said] = output.request_id, output.outputs
        if name not in self._asked:
            return
        if said.token_ids and name not in self._first:
            self._first[name] = self._clocks()
            if not output.finished:
                self._link.send(("began", name))
        if output.finished:
            _, came = self._asked.pop(name)
            self._answer(name, list(said.token_ids), str(said.finish_reason), output.kv_transfer_params, came)

    def _answer(self, name: str, tokens: list[int], reason: str, params: Any, came: _Clocks) -> None:
        now = self._clocks()
        first = self._first.pop(name, now)
        answer = {
            "tokens": tokens,
            "reason": reason,
            "params": params,
            "first": first.wall - came.wall,
            "seconds": now.wall - came.wall,
            "processor": first.processor - came.processor,
            "steps": first.steps - came.steps,
        }
        self._link.send(("answer", name, answer))

    def _clocks(self) -> _Clocks:
        return _Clocks(time.perf_counter(), time.process_time(), self._steps)

    def _state(self) -> dict[str, Any]:
        values = [each for each in self._llm.get_metrics() if hasattr(each, "value")]
        metrics = {each.name: each.value for each in values}
        # vLLM counts hits when it admits a request; these are the requests whose blocks have come.
        loaded = [each for each in values if each.name == "vllm:tensorway_kv_requests"]
        state = {
            "hits": int(metrics.get("vllm:external_prefix_cache_hits", 0)),
            "loaded": int(sum(each.value for each in loaded if each.labels["cause"] == "none")),
            "metrics": metrics,
        }
        if self._core is not None:
            scheduler = self._core.scheduler
            state["free"] = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
            state["requests"] = len(scheduler.requests)
            state["blocks"] = scheduler.kv_cache_config.num_blocks
        return state


def main(number: int) -> None:
    """Serve what comes over an inherited connection."""
    link = Connection(number)
    Serving(link, link.recv()).run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
