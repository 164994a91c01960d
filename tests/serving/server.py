"""A vLLM server in a process of its own, and what its clients ask (no test of its own).

The folder is not called vllm: the tests' folders are searched for modules, and `import vllm` would find it.
"""

import functools
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.serving.made import Answer

ROOT = Path(__file__).parents[2]
START_SECONDS = 400
SECONDS_TO_COME = 3
TOLERANCE = 5e-5
BASE = "base"
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # or it cannot be paused
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
STOCK = {"VLLM_PLUGINS": ""}


def skip_without_vllm() -> None:
    """Skips the module that calls it."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM has an environment of its own (make vllm)", allow_module_level=True)


@dataclass(frozen=True)
class Server:
    """A running server. `model` in what follows is "base", or the name of an adapter."""

    url: str
    log: Path

    @functools.cached_property
    def client(self) -> Any:
        import openai  # where vLLM is, it is

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def ask(self, model: str, prompt: Sequence[int], length: int, events: list | None = None) -> Answer:
        """The greedy answer, streamed. `events` gets ("begin", model) and ("end", model)."""
        tokens, logprobs = [], []
        stream = self.client.completions.create(
            model=model,
            prompt=list(prompt),
            max_tokens=length,
            temperature=0,
            logprobs=1,
            stream=True,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )
        for chunk in stream:
            found = chunk.choices[0].logprobs
            if found is None:
                continue
            if not tokens and events is not None:
                events.append(("begin", model))
            tokens += [int(token.removeprefix("token_id:")) for token in found.tokens]
            logprobs += found.token_logprobs
        if events is not None:
            events.append(("end", model))
        return Answer(tokens, logprobs)

    def ask_at_once(self, asked: Sequence[tuple[str, Sequence[int]]], length: int) -> tuple[list[Answer], list]:
        """Answers in the order asked, computed at once; and the events in their order.

        The engine rests until all have come: on a busy machine the first would else be done before the last is sent.
        """
        events = []
        requests.post(f"{self.url}/pause", params={"mode": "keep"}).raise_for_status()
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = [pool.submit(self.ask, *one, length, events) for one in asked]
            time.sleep(SECONDS_TO_COME)
            requests.post(f"{self.url}/resume").raise_for_status()
            return [answer.result() for answer in answers], events

    def knows(self, model: str) -> bool:
        """Whether a request for it is answered, and not by 404."""
        import openai

        try:
            self.ask(model, [5], 1)
        except openai.NotFoundError:
            return False
        return True

    def tokenize(self, text: str) -> list[int]:
        return requests.post(f"{self.url}/tokenize", json={"model": BASE, "prompt": text}).json()["tokens"]

    def load(self, name: str, path: Path) -> requests.Response:
        return requests.post(f"{self.url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})

    def unload(self, name: str) -> requests.Response:
        return requests.post(f"{self.url}/v1/unload_lora_adapter", json={"lora_name": name})


def start(model: Path, log: Path, *arguments: str, port: int, **environment: str) -> subprocess.Popen:
    """The process of a server, which writes to `log`. The command `vllm` looks for a package of another name."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--served-model-name", BASE, "--dtype", "float32", "--max-model-len", "512", *arguments]
    path = os.pathsep.join([str(ROOT), str(ROOT / "interop"), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path, **environment},
            start_new_session=True,
        )


@contextmanager
def serving(model: Path, log: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """A server that answers, ended afterwards."""
    port = free_port()
    process, server = start(model, log, *arguments, port=port, **environment), Server(f"http://127.0.0.1:{port}", log)
    try:
        until = time.monotonic() + START_SECONDS
        while not _answers(server.url):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-6000:]}")
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()  # it ends its engine
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def not_starting(model: Path, log: Path, *arguments: str) -> str:
    """What a server writes that must end instead of answering."""
    process = start(model, log, *arguments, port=free_port())
    try:
        code = process.wait(START_SECONDS)
    finally:
        process.kill()
    assert code != 0
    return log.read_text()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.RequestException:
        return False


def lora_modules(adapters: dict[str, Path]) -> list[str]:
    """The flag that names adapters at the start."""
    return ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]


def assert_same(found, expected, measured=None, what="", tolerance=TOLERANCE):
    """The same tokens, and log-probabilities that differ by less than `tolerance`, in nats."""
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    for one, other in zip(found, expected, strict=True):
        difference = max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))
        if measured is not None:
            measured(f"{what}: log-probabilities in vLLM against PEFT", difference)
        assert difference < tolerance
