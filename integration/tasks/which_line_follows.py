"""The items of the task which_line_follows: load them, or make them anew.

    python integration/tasks/which_line_follows.py        # writes which_line_follows.jsonl beside itself

An item is six lines of a standard-library file and four candidates for the seventh: the true one and
three lines of other files, with the same indentation and about the same length, so that neither gives
the answer away. The files are those of the split ``test`` of the embedded corpus, which the demo models
were not trained on. One Python release gives the same bytes every time; the committed items are made
with 3.11.7.

The items quote the Python standard library, Copyright (c) 2001-2023 Python Software Foundation; All
Rights Reserved, under its licence: https://docs.python.org/3.11/license.html
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ITEMS = Path(__file__).with_suffix(".jsonl")
COUNT = 200
CHOICES = 4
#: Lines of context, and the most characters that they may have together: the items stay below 100 kB.
CONTEXT = 6
CONTEXT_CHARACTERS = 280
#: Characters of a candidate without its indentation.
SHORTEST, LONGEST = 12, 60
#: The most characters by which a wrong candidate is longer or shorter than the true one.
LENGTH_DIFFERENCE = 3


def load(**_: Any) -> dict[str, Any]:
    """Return the items as lm-eval wants them of a ``custom_dataset``: a dataset by split."""
    from datasets import Dataset

    rows = [json.loads(line) for line in ITEMS.read_text(encoding="utf-8").splitlines()]
    return {"test": Dataset.from_list(rows)}


def make(texts: Mapping[str, str], count: int = COUNT, seed: int = 0) -> list[dict[str, Any]]:
    """Return items of files by name, at most ``count``: one of each file in turn, until none is left."""
    rng = random.Random(seed)  # noqa: S311
    lines = {name: texts[name].splitlines() for name in sorted(texts)}
    places = {name: [i for i in range(CONTEXT, len(of)) if _usable(of, i)] for name, of in lines.items()}
    pool = [(name, lines[name][i]) for name, found in places.items() for i in found]
    queue = {name: rng.sample(found, len(found)) for name, found in places.items()}
    items: list[dict[str, Any]] = []
    while len(items) < count and any(queue.values()):
        for name in [name for name, left in queue.items() if left]:
            at = queue[name].pop()
            wrong = _lines_like(lines[name][at], name, lines[name], pool)
            if len(wrong) >= CHOICES - 1 and len(items) < count:
                items.append(_item(name, lines[name], at, rng.sample(wrong, CHOICES - 1)))
    answers = [i % CHOICES for i in range(len(items))]
    rng.shuffle(answers)
    for item, answer in zip(items, answers, strict=True):  # the true line is the first until here
        item["choices"].insert(answer, item["choices"].pop(0))
        item["answer"] = answer
    return items


def _usable(lines: Sequence[str], i: int) -> bool:
    """Return True if line ``i`` is of middling length and has a context that fits."""
    text, context = lines[i].strip(), "\n".join(lines[i - CONTEXT : i])
    return (
        SHORTEST <= len(text) <= LONGEST
        and any(c.isalpha() for c in text)
        and context.strip() != ""
        and len(context) <= CONTEXT_CHARACTERS
        and (context + text).isascii()
    )


def _lines_like(true: str, name: str, own: Sequence[str], pool: Sequence[tuple[str, str]]) -> list[str]:
    """Return the lines of other files that look like the true one from afar and are not in its file."""
    known = set(own)
    return sorted(
        {
            line
            for other, line in pool
            if other != name
            and line not in known
            and _indentation(line) == _indentation(true)
            and abs(len(line) - len(true)) <= LENGTH_DIFFERENCE
        }
    )


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def _item(name: str, lines: Sequence[str], at: int, wrong: Sequence[str]) -> dict[str, Any]:
    context = "".join(f"{line}\n" for line in lines[at - CONTEXT : at])
    return {"file": name, "line": at + 1, "context": context, "choices": [lines[at], *wrong]}


def main() -> int:
    import sysconfig

    from msp_plugin.data.demo_corpus import library_files

    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8", errors="replace")
        for path in library_files("test")
    }
    items = make(texts)
    ITEMS.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    print(f"{len(items)} items of {len({item['file'] for item in items})} files: {ITEMS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
