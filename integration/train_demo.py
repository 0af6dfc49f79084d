"""Train a demo model from scratch on the standard library's own source.

    python integration/train_demo.py --arch llama --tokens 12e6 --out msp_plugin/demo/llama

Everything that is needed is on every machine with Python: the text is the standard library of the
running interpreter, split by a hash of the file names (msp_plugin/demo/corpus.py). The schedule is
warm-up, constant, linear decay over the last 30 % (of the tokens, or of --minutes if that comes
first). Writes bf16 safetensors, tokenizer and a model card with the test perplexity.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from msp_plugin.data.demo_corpus import library_texts

VOCAB = 2048
CONTEXT = 256
COMMON = dict(
    vocab_size=VOCAB,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    attention_dropout=0.0,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(
        hidden_size=256, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=False, **COMMON,
    ),
    "qwen2": lambda: Qwen2Config(
        hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, **COMMON,
    ),
}  # fmt: skip


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with ``VOCAB`` entries; id 0 is ``<|endoftext|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end,
        model_max_length=1024, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Return uint16[T]: the texts one after the other, each closed by ``<|endoftext|>``."""
    pieces = []
    for text in texts:
        pieces.append(np.array([*tokenizer(text).input_ids, 0], dtype=np.uint16))
    return np.concatenate(pieces)


def perplexity(model, ids: np.ndarray, windows: int) -> float:
    """Return exp of the mean next-token loss over the first ``windows`` windows of CONTEXT tokens."""
    n = min(windows, len(ids) // CONTEXT)
    batch = torch.from_numpy(ids[: n * CONTEXT].astype(np.int64)).view(n, CONTEXT)
    losses = []
    model.eval()
    with torch.no_grad():
        for rows in batch.split(16):
            losses.append(model(rows, labels=rows).loss.item() * len(rows))
    model.train()
    return math.exp(sum(losses) / n)


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over 2 %, constant, then linear to a tenth of a per cent over the last 30 %."""
    if progress < 0.02:
        return peak * max(progress, 1e-4) / 0.02
    return peak * (1.0 if progress < 0.7 else max(0.001, (1.0 - progress) / 0.3))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_file = Path(args.tokenizer) if args.tokenizer else None
    train_texts = library_texts("train")
    if tokenizer_file:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_file)
    else:
        tokenizer = train_tokenizer(train_texts)
    tokenizer.save_pretrained(out)
    ids = token_stream(tokenizer, train_texts)
    test = token_stream(tokenizer, library_texts("test"))
    print(f"train {len(ids):,} tokens, test {len(test):,}", flush=True)

    device = torch.device(args.device)
    model = AutoModelForCausalLM.from_config(CONFIGS[args.arch]()).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    decay = [p for p in model.parameters() if p.dim() == 2]
    other = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [dict(params=decay, weight_decay=0.1), dict(params=other, weight_decay=0.0)],
        lr=args.lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    step_model = torch.compile(model) if args.compile else model
    generator = np.random.default_rng(args.seed)
    budget, start, seen, step = int(args.tokens), time.time(), 0, 0
    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if args.bf16 else contextlib.nullcontext()
    ema = None
    while True:
        progress = max(seen / budget, (time.time() - start) / (60 * args.minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        at = generator.integers(0, len(ids) - CONTEXT - 1, args.batch)
        rows = torch.from_numpy(np.stack([ids[i : i + CONTEXT] for i in at]).astype(np.int64))
        rows = rows.to(device)
        with autocast:
            loss = step_model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen, step = seen + rows.numel(), step + 1
        ema = loss.item() if ema is None else 0.98 * ema + 0.02 * loss.item()
        if step % 50 == 0:
            rate = seen / (time.time() - start)
            if args.snapshot and step % 1000 == 0:
                model.save_pretrained(args.snapshot)
            print(f"step {step} tokens {seen:,} loss {ema:.3f} {rate:,.0f} tok/s", flush=True)
    seconds = time.time() - start
    model = model.to("cpu").to(torch.bfloat16)
    model.save_pretrained(out)
    # As users load it: AutoTokenizer picks the class by the model's type, and that class may split
    # text before the merges in another way than the tokenizer that was trained.
    as_loaded = token_stream(AutoTokenizer.from_pretrained(out), library_texts("test"))
    if not np.array_equal(as_loaded, test):
        print(f"AutoTokenizer splits otherwise: {len(as_loaded):,} test tokens, trained on {len(test):,}")
    test = as_loaded
    ppl = perplexity(model.float(), test, 10**9)
    record = dict(
        arch=args.arch, parameters=parameters, tokens_seen=seen, unique_tokens=len(ids),
        seconds=round(seconds), test_perplexity=round(ppl, 3), test_tokens=len(test), context=CONTEXT,
        batch=args.batch, lr=args.lr, seed=args.seed, python=platform.python_version(),
        torch=torch.__version__,
    )  # fmt: skip
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    write_card(out, record)
    print(json.dumps(record, indent=2))


def write_card(out: Path, r: dict) -> None:
    """Write the model card beside the weights."""
    (out / "README.md").write_text(f"""---
license: apache-2.0
library_name: transformers
---
# msp_plugin demo model ({r["arch"]})

A small causal language model of Python source, made so that `msp demo` runs anywhere. It is no use
for anything else.

- {r["parameters"]:,} parameters, {r["arch"]} architecture, byte-level BPE of {VOCAB} entries, bf16.
- Trained from scratch by `integration/train_demo.py` (seed {r["seed"]}) for {r["tokens_seen"]:,} tokens
  ({r["unique_tokens"]:,} distinct) of the source of the Python {r["python"]} standard library, AdamW,
  peak learning rate {r["lr"]:g}, batch {r["batch"]} x {r["context"]}, {r["seconds"]:,} seconds with torch {r["torch"]}.
- The files are split by a hash of their names (`msp_plugin/demo/corpus.py`): 80 % training and 5 % each for
  calibration, search, hold-out and test.
- Test perplexity {r["test_perplexity"]:.2f} per token over {r["test_tokens"]:,} test tokens in windows of {r["context"]}.

The training text is licensed by the Python Software Foundation; the weights are Apache-2.0.
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=sorted(CONFIGS), required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokens", type=float, default=15e6, help="stop after so many tokens")
    parser.add_argument("--minutes", type=float, default=1e6, help="or after so many minutes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokenizer", help="reuse the tokenizer of this directory")
    parser.add_argument("--snapshot", help="save float32 weights here every 1000 steps")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16 (slower on CPUs without AMX)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
