"""Serve one model in this process and time what it is asked: decode_speed.py MODEL DTYPE [eager].

Each line of the input is JSON: token ids of ``prompts``, and the number of greedy ``tokens`` behind each. The answer is a line
that begins with ANSWER: ``wall`` and ``cpu`` seconds, and the ``tokens``.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
ANSWER = "ANSWER "


def main(model: str, dtype: str, *how: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype=dtype, enforce_eager="eager" in how, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=512,
        distributed_executor_backend="uni", enable_prefix_caching=False, skip_tokenizer_init=True,
    )  # fmt: skip
    print(ANSWER + "{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        greedy = SamplingParams(temperature=0, max_tokens=asked["tokens"], detokenize=False, ignore_eos=True)
        wall, cpu = time.perf_counter(), time.process_time()
        answers = llm.generate(prompts, greedy, use_tqdm=False)
        taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        taken["tokens"] = [list(answer.outputs[0].token_ids) for answer in answers]
        print(ANSWER + json.dumps(taken), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
