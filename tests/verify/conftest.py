"""Checks run on small checkpoints, and a program that stands for ``vllm``: a real process with a real port."""

import json
import sys

import pytest

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.verify.base import Subject, run_checks

PROGRAM = """
import json, os, signal, socket, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

assert sys.argv[1] == "serve", sys.argv
model, options = sys.argv[2], dict(zip(sys.argv[3::2], sys.argv[4::2]))
mode, here = options.get("--mode", "good"), Path(sys.argv[0]).resolve().parent
(here / "argv.json").write_text(json.dumps(sys.argv[1:]))
print("fake server starts in mode", mode, flush=True)
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background would hand on that it is ignored
if mode == "dies":
    print("WARNING can cause errors like `OSError: [Errno 24] Too many open files`", file=sys.stderr)
    print("(EngineCore pid=7) ERROR 11-23 [core.py:9] ValueError: no room", file=sys.stderr)
    print("RuntimeError: engine core failed, see above", file=sys.stderr)
    print("\\n".join(f"line {i}" for i in range(100)), "the reason", sep="\\n", file=sys.stderr)
    sys.exit(3)
if mode == "never":
    time.sleep(1000)
if mode in ("stubborn", "family"):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "family":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])  # it ignores them too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (here / "child").write_text(str(child.pid))
if mode == "babbles":
    with socket.create_server((options["--host"], int(options["--port"]))) as door:
        while True:
            caller = door.accept()[0]
            caller.recv(1000)
            caller.sendall(b"this is no HTTP\\r\\n\\r\\n")
            caller.close()
if "MSP_SERVING_REPORT" in os.environ and (here / "report.jsonl").is_file():
    Path(os.environ["MSP_SERVING_REPORT"]).write_bytes((here / "report.jsonl").read_bytes())
answers = json.loads((here / "answers.json").read_text()) if (here / "answers.json").is_file() else {}


class Handler(BaseHTTPRequestHandler):
    def say(self, code, text):
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        assert self.path == "/health"
        self.say(503 if mode == "loads" else 200, b"")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (here / "request.json").write_text(json.dumps({"path": self.path, "body": body}))
        key, count = ",".join(map(str, body["prompt"])), body["max_tokens"]
        if mode == "dies later":
            print("last words", flush=True)
            os._exit(7)
        if mode == "hangs up and dies":
            self.connection.shutdown(socket.SHUT_RDWR)
            time.sleep(0.4)
            print("last words", flush=True)
            os._exit(7)
        if mode == "stops halfway":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"{")
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if mode == "babbles later":
            self.wfile.write(b"this is no HTTP\\r\\n\\r\\n")
            return
        found = answers.get(key, {"code": 200, "tokens": [5] * count, "logprobs": [-0.5] * count})
        if "text" not in found:
            choice = {"token_ids": found["tokens"], "logprobs": {"token_logprobs": found["logprobs"]}}
            found = {"code": 200, "text": json.dumps({"choices": [choice]})}
        self.say(found["code"], found["text"].encode())

    def log_message(self, *args):
        pass


ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""


@pytest.fixture(scope="session")
def make_vllm(tmp_path_factory):
    """Return a virtual environment whose ``vllm`` is the program, with what it answers and reports.

    Args:
        answers: by prompt ("1,2,3"): {"tokens", "logprobs"}, or {"code", "text"} of any answer.
        report: the lines of the plugin's report.
    """

    def make(answers=None, report=None):
        environment = tmp_path_factory.mktemp("environment")
        folder = environment / "bin"
        folder.mkdir()
        program = folder / "vllm"
        program.write_text(f"#!{sys.executable}\n{PROGRAM}")
        program.chmod(0o755)
        if answers is not None:
            (folder / "answers.json").write_text(json.dumps(answers))
        if report is not None:
            (folder / "report.jsonl").write_text("".join(json.dumps(line) + "\n" for line in report))
        return environment

    return make


@pytest.fixture(scope="session")
def check():
    """Run one check and return its rows by item; the progress must count up to its total."""

    def check(checker, path, reference=None, **fields):
        counted = {}
        subject = Subject(Checkpoint.open(path), Checkpoint.open(reference) if reference else None, **fields)
        (result,) = run_checks(
            subject, [checker], lambda step, done, total, note="": counted.update({step: (done, total)})
        )
        assert result.check == checker.name
        assert not result.passed or all(done == total for done, total in counted.values())
        rows = {finding.item: finding for finding in result.findings}
        assert len(rows) == len(result.findings)
        assert result.passed == all(row.state != "fail" for row in rows.values())
        return rows

    return check


@pytest.fixture(scope="session")
def states():
    return lambda rows: {item: row.state for item, row in rows.items()}


@pytest.fixture(scope="session")
def revive():
    """Fill one zero in."""

    def revive(weight):
        row, column = (weight == 0).nonzero()[-1]
        weight[row, column] = 0.5
        return weight

    return revive


@pytest.fixture(scope="session")
def spoil():
    def spoil(value, index=(3, 5)):
        def change(tensor):
            tensor[index] = value
            return tensor

        return change

    return spoil


@pytest.fixture
def unsealed(packed_dir, copied):
    """The packed checkpoint without export.json, so that only the content can give damage away."""
    path = copied(packed_dir)
    (path / "export.json").unlink()
    return path


@pytest.fixture
def text(make_samples):
    return make_samples(4, 24, 3)
