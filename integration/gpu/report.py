"""The verdicts on the targets, and the report in Markdown. Needs the results alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import geometric_mean

MEMORY_TARGET, SPEED_TARGET, SPEED_TOKENS = 0.60, 1.3, 1024
LARGE = "min(out, in) >= 4096 or out x in >= 50e6"


def is_large(shape: tuple[int, int]) -> bool:
    """Return True for the shapes that the speed target is about."""
    return min(shape) >= 4096 or math.prod(shape) >= 50e6


def measured_layers(results: dict) -> list[dict]:
    """Return the layers that were timed; on a slow machine some are left out."""
    return [layer for layer in results.get("linears", {}).get("layers", []) if layer["times"]]


def verdicts(results: dict) -> list[dict]:
    """Return the targets, whether they are met, and by how much."""
    sections = [(name, part) for name, part in results.items() if "ok" in part]
    failed = [name for name, part in sections if not part["ok"]]
    text = f"wrong or failed: {', '.join(failed)}" if failed else f"all {len(sections)} sections"
    found = [{"target": "correctness", "passed": bool(sections) and not failed, "detail": text}]
    layers = measured_layers(results)
    if layers:
        found += [memory_verdict(layers), speed_verdict(layers)]
    return found


def memory_verdict(layers: list[dict]) -> dict:
    """Return the verdict on the layer that takes the largest share."""
    worst = max(layer["bytes"] for layer in layers)
    text = f"largest share {worst:.4f} of the dense bytes, target {MEMORY_TARGET}"
    return {"target": "memory", "passed": worst <= MEMORY_TARGET, "detail": text}


def speed_verdict(layers: list[dict]) -> dict:
    """Return the verdict on the large layers at many tokens."""
    points = {
        f"{layer['model']} {layer['layer']} at {row['tokens']}": row["ratio"]
        for layer in layers
        if is_large(tuple(layer["shape"]))
        for row in layer["times"]
        if row["tokens"] >= SPEED_TOKENS
    }
    if not points:
        return {"target": "speed", "passed": False, "detail": "nothing measured"}
    met = sum(ratio >= SPEED_TARGET for ratio in points.values())
    worst = min(points, key=points.__getitem__)
    text = (
        f"{met} of {len(points)} points at >= {SPEED_TARGET} (layers with {LARGE}, >= {SPEED_TOKENS} tokens); mean "
        f"{geometric_mean(points.values()):.2f}, least {points[worst]:.2f} ({worst}), most {max(points.values()):.2f}"
    )
    return {"target": "speed", "passed": met == len(points), "detail": text}


def markdown(results: dict) -> str:
    """Return the report."""
    about = results.get("machine", {})
    lines = ["# 2:4 kernels", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key not in ("ok", "error", "traceback")]
    lines += ["", "| target | | |", "|---|---|---|"]
    lines += [
        f"| {v['target']} | {'PASS' if v['passed'] else 'FAIL'} | {v['detail']} |" for v in verdicts(results)
    ]
    layers = measured_layers(results)
    if layers:
        lines += ["", "## Dense time over sparse time, bfloat16", "", *ratio_table(layers)]
        lines += ["", "## Microseconds, dense / sparse", "", *time_table(layers)]
        lines += ["", "## Algorithms: microseconds of the default and of the one searched", ""]
        lines += algorithm_table(layers)
    lines += ["", *forward_lines(results.get("end_to_end", {}))]
    lines += [f"\n{name} failed: `{part['error']}`" for name, part in results.items() if "error" in part]
    return "\n".join(lines).rstrip() + "\n"


def layer_table(layers: list[dict], head: str, cell: Callable[[dict], str]) -> list[str]:
    """Return a table of one row for each layer and one column for each number of tokens."""
    counts = list(dict.fromkeys(row["tokens"] for layer in layers for row in layer["times"]))
    lines = [
        f"| layer | out x in | {head} | " + " | ".join(map(str, counts)) + " |",
        "|" + "---|" * (3 + len(counts)),
    ]
    for layer in layers:
        cells = {row["tokens"]: cell(row) for row in layer["times"]}
        rest = f"{layer['bytes']:.3f}" if head == "bytes" else layer["kernel"]
        shape = " x ".join(map(str, layer["shape"]))
        values = " | ".join(cells.get(count, "-") for count in counts)
        lines.append(f"| {layer['model']} {layer['layer']} | {shape} | {rest} | {values} |")
    return lines


def ratio_table(layers: list[dict]) -> list[str]:
    return layer_table(layers, "bytes", lambda row: f"{row['ratio']:.2f}")


def time_table(layers: list[dict]) -> list[str]:
    return layer_table(layers, "kernel", lambda row: f"{row['dense_us']:.1f} / {row['sparse_us']:.1f}")


def algorithm_table(layers: list[dict]) -> list[str]:
    lines = [
        "| layer | tokens | searched | default | searched | split over in |",
        "|---|---|---|---|---|---|",
    ]
    for layer in layers:
        for row in layer["algorithms"]:
            us = row.get("us", {})
            cells = [f"{us[name]:.1f}" if name in us else "-" for name in ("default", "searched", "split")]
            name = f"{layer['model']} {layer['layer']}"
            lines.append(f"| {name} | {row['tokens']} | {row['algorithm']} | {' | '.join(cells)} |")
    return lines


def forward_lines(part: dict) -> list[str]:
    if "forwards" not in part:
        return []
    errors = ", ".join(f"{name} {value:.2e}" for name, value in part["relative_errors"].items())
    lines = [
        f"## A Llama of {part['parameters'] / 1e6:.0f} M parameters, dense time over sparse time",
        "",
        f"Logits, relative to float32: {errors}. Linears take {part['linear_bytes']:.3f} of the dense bytes.",
        "",
        "| batch x tokens | launched by the host | CUDA graph |",
        "|---|---|---|",
    ]
    for row in part["forwards"]:
        graph = f"{row['graph_ratio']:.2f}" if "graph_ratio" in row else "not captured"
        lines.append(f"| {row['shape'][0]} x {row['shape'][1]} | {row['eager_ratio']:.2f} | {graph} |")
    return lines
