"""Options of commands that many tests give."""

#: A search of a few seconds on a demo model.
SEARCH = [
    "--set", "allocator.rounds=1", "--set", "allocator.seeds=3", "--set", "allocator.tokens=128",
    "--set", "allocator.holdout=64", "--set", "fisher.samples=2",
]  # fmt: skip
