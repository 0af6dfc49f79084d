"""Start a vLLM server on a checkpoint, query it over HTTP, and stop it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from msp_plugin.errors import RecipeError, ServingError
from msp_plugin.runtime.files import expanded

#: The environment variable that tells the vLLM plugin the file for its report.
REPORT = "MSP_SERVING_REPORT"
_LAST_LINES = 25
#: An exception as Python prints it, anywhere in a line of the log.
_EXCEPTION = re.compile(r"(?<![\w`'])(?:\w+\.)*[A-Z]\w*(?:Error|Exception): .+")
#: Opens URLs without the environment's proxies: the server is on this machine.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Completion:
    """Tokens, and the natural log-probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        name: the model's name in requests; random, so that no other server can answer in its place.
        url: the root address.
        log: the file with its output.
        report: the file in which the vLLM plugin writes one JSON line per layer and process.
        process: the server's process, the leader of its own process group.
    """

    name: str
    url: str
    log: Path
    report: Path
    process: subprocess.Popen[bytes]

    def complete(self, tokens: Sequence[int], count: int) -> Completion:
        """Return ``count`` greedy tokens after a prompt of token ids.

        Raises:
            ServingError: the server ended, refused, or gave an unexpected answer.
        """
        body = {
            "model": self.name,
            "prompt": list(tokens),
            "max_tokens": count,
            "temperature": 0,
            "logprobs": 1,
            "ignore_eos": True,
            "return_token_ids": True,
            "seed": 0,
            "repetition_penalty": 1.0,  # else vLLM takes the one in the model's generation_config.json
        }
        answer = self._post("/v1/completions", body)
        try:
            choice = answer["choices"][0]
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            completion = Completion(tuple(int(t) for t in ids), tuple(float(p) for p in logprobs))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServingError(
                f"the server's answer lacks {error}: {json.dumps(answer)[:300]}",
                hint="vLLM 0.32 or newer is expected",
            ) from None
        if len(completion.tokens) != count or len(completion.logprobs) != count:
            raise ServingError(f"the server answered {len(completion.tokens)} tokens, {count} were asked for")
        return completion

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the JSON that the server answers to a POST request."""
        request = urllib.request.Request(  # noqa: S310 - http on this machine
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with _DIRECT.open(request, timeout=600) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise ServingError(
                f"the server refused with {error.code}: {error.read().decode()[:500]}"
            ) from None
        except ValueError as error:
            raise ServingError(f"no answer from the server: {error}") from None
        except (OSError, HTTPException) as error:
            try:
                self.process.wait(1)  # a server that dies closes its connections first
            except subprocess.TimeoutExpired:
                raise ServingError(f"no answer from the server: {error}") from None
            raise _died(self.process, self.log) from None

    def layers(self) -> list[dict[str, Any]]:
        """Return the vLLM plugin's report of each layer; empty if the plugin is not installed or packs nothing."""
        if not self.report.is_file():
            return []
        try:
            return [json.loads(line) for line in self.report.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise ServingError(f"the plugin's report is not readable: {error}") from None


def vllm_executable(environment: Path) -> Path:
    """Return the ``vllm`` executable of a virtual environment, or the path itself if it is one.

    Raises:
        RecipeError: there is none.
    """
    environment = expanded(environment)
    for path in (environment / "bin" / "vllm", environment):
        if path.is_file() and os.access(path, os.X_OK):
            return path.absolute()
    raise RecipeError(
        f"there is no vllm executable in {environment}",
        hint="give the directory of a virtual environment with vLLM and msp_plugin, or the path of its vllm",
    )


@contextmanager
def serving(
    environment: Path,
    model: Path,
    arguments: Sequence[str] = (),
    *,
    port: int | None = None,
    patience: float = 600,
) -> Iterator[Server]:
    """Yield a server that is ready to answer, and stop it when the block ends, however it ends.

    Args:
        arguments: further arguments of ``vllm serve``.
        port: None for any free port.
        patience: seconds that the server may take to get ready.

    Raises:
        RecipeError: the environment has no vLLM.
        ServingError: the port is taken, or the server ends or does not get ready; the message has its last lines.
    """
    executable, port = vllm_executable(environment), _free_port(port)
    name = f"msp-{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="msp-serve-") as directory:
        log, report = Path(directory) / "log", Path(directory) / "report.jsonl"
        options = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
        command = [str(executable), "serve", str(model.absolute()), *options, *arguments]
        variables = {**os.environ, REPORT: str(report), "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True
                )
            except OSError as error:
                raise ServingError(f"cannot start {executable}: {error}") from None
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}/health", log, patience)
            yield Server(name, f"http://127.0.0.1:{port}", log, report, process)
        finally:
            _stop(process)


def _free_port(port: int | None) -> int:
    """Return the port, or any free one for None; raise ServingError if the port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
        except OSError as error:
            raise ServingError(
                f"port {port} cannot be used: {error.strerror}",
                hint="give another port, or none for any free one",
            ) from None
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, patience: float) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise _died(process, log)
        try:
            with _DIRECT.open(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (OSError, HTTPException):
            time.sleep(0.5)
    raise ServingError(f"the server was not ready after {patience:.0f} s; its last lines:\n{_tail(log)}")


def _died(process: subprocess.Popen[bytes], log: Path) -> ServingError:
    """Return the error of a server that ended, with its first exception and its last lines."""
    cause = _first_error(log)
    because = f" ({cause})" if cause else ""
    return ServingError(
        f"the server ended with exit status {process.returncode}{because}; its last lines:\n{_tail(log)}"
    )


def _first_error(log: Path) -> str:
    """Return the first exception in the log; it says why vLLM ended, the last lines often do not."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := _EXCEPTION.search(line):
            return match[0][:300]
    return ""


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  | {line[:300]}" for line in lines[-_LAST_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server and the processes that it started: first ask them to end, then kill them."""
    for sign, seconds in ((signal.SIGINT, 20), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
