"""The contents of a run's report, section by section."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePath
from typing import Any

from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import Level
from msp_plugin.plugins.manager import Plugins
from msp_plugin.pruning.base import Pruner
from msp_plugin.records.parts import SearchRecord, TextRecord
from msp_plugin.records.run import RECOVER, RunRecord
from msp_plugin.records.statistics import finite_pairs, finite_values, rank_correlation, taken_back
from msp_plugin.report.charts import Chart, Series, draw
from msp_plugin.report.grid import lay_out, level_class, level_grid, sensitivity_grid
from msp_plugin.report.recovery import recovery_parts, stage_rows
from msp_plugin.report.size import sizes
from msp_plugin.report.source import Run
from msp_plugin.report.speed import measured_speed
from msp_plugin.report.storage import storages
from msp_plugin.report.text import count, number, percent, rounded_percent, seconds
from msp_plugin.search.options import Options

NOT_RECORDED = "not recorded"
#: Labels of the loss that a search measures, by the allocator's option ``loss``.
_LOSSES = {
    "kl": "KL to the dense model, nats per token",
    "perplexity": "log perplexity, nats per token",
}

#: Keys of an allocation's provenance that the page shows in rows of their own.
_SHOWN = frozenset(
    [
        "allocator",
        "calibration",
        "estimators",
        "ignore",
        "levels",
        "loss",
        "method",
        "model",
        "seed",
        "targets",
        "uniform_loss",
        "versions",
    ]
)


def run_page(run: Run) -> dict[str, Any]:
    """Return the variables of the template run.html."""
    record, allocation = run.record, run.allocation
    layout = lay_out(allocation.table)
    given, smaller = allocation.provenance, sizes(allocation, run.checkpoint)
    return {
        "title": f"{model_name(record, given)} at {rounded_percent(allocation.target)} sparsity",
        "facts": _facts(run),
        "key": _key(record),
        "pruned": run.pruned,
        "levels": level_counts(allocation),
        "grid": level_grid(allocation, layout),
        "sensitivities": [
            sensitivity_grid(name, allocation.table, values, layout)
            for name, values in sorted(allocation.sensitivities.items())
        ],
        "search": record.search,
        "curve": _curve(record.search, given),
        "predictions": _predictions(record.search),
        "quality": _quality(record),
        "sizes": smaller,
        "storages": storages(allocation, record.model.dtype, run.checkpoint),
        "stages": stage_rows(record),
        "recoveries": recovery_parts(record),
        "speed": (*record.speed, *measured_speed(run.directory)),
        "provenance": _provenance(run),
        "commands": _commands(run, smaller=bool(smaller)),
    }


def model_name(record: RunRecord, given: Any) -> str:
    """Return a model's short name: the end of its path or id, else its architecture."""
    name = PurePath(record.model.source or "").name
    return name or str(_inside(given, "model").get("architecture") or "Model")


def _inside(data: Any, *keys: str) -> dict[str, Any]:
    """Return the dictionary at a path of keys; empty if there is none."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def spec_text(spec: dict[str, Any]) -> str:
    """Return a component as one line: its name and its options."""
    options = ", ".join(f"{key} {value}" for key, value in sorted(spec.items()) if key != "name")
    name = str(spec.get("name", "–"))
    return f"{name} ({options})" if options else name


def _facts(run: Run) -> list[tuple[str, str]]:
    record, allocation, given = run.record, run.allocation, run.allocation.provenance
    budget = allocation.budget
    facts = [
        ("Model", f"{model_name(record, given)}, {_inside(given, 'model').get('architecture', '–')}"),
        ("Method", spec_text(_inside(given, "method"))),
        ("Allocator", spec_text(_inside(given, "allocator"))),
        ("Units", f"{len(allocation.table)} in {len({u.block for u in allocation.table})} blocks"),
        ("Sparsity, target", f"{rounded_percent(allocation.target)} ({allocation.target})"),
        (
            "Sparsity, planned",
            f"{percent(budget.sparsity, 4)}, {count(budget.zeros)} of {count(budget.weights)}",
        ),
    ]
    zeros, achieved = record.sparsity.zeros, record.sparsity.achieved
    result = "not pruned yet" if not run.pruned else NOT_RECORDED
    if achieved is not None:
        result = percent(achieved, 4) + (f", {count(zeros)} zeros recounted" if zeros is not None else "")
    return [*facts, ("Sparsity, achieved", result)]


def _key(record: RunRecord) -> str:
    """Return the sentence with the result of a run; empty if nothing was measured."""
    values = record.perplexity
    dense, uniform, mixed = (values.get(name) for name in ("dense", "uniform", "mixed"))
    recovered = values.get("recovered")
    sparse = mixed if mixed is not None else values.get("result")
    back = taken_back(dense, sparse, recovered)
    if back is not None:
        verb = f"took back {percent(back, 0)} of" if back >= 0 else f"added {percent(-back, 0)} to"
        return (
            f"The recovery {verb} the loss of the pruned model: test perplexity {number(recovered)}, before it "
            f"{number(sparse)}, dense {number(dense)}."
        )
    share = taken_back(dense, uniform, mixed)
    if share:  # zero for the uniform allocation itself
        verb = f"takes back {percent(share, 0)} of" if share >= 0 else f"adds {percent(-share, 0)} to"
        return (
            f"Mixed sparsity {verb} the loss that uniform sparsity adds: test perplexity {number(mixed)}, "
            f"uniform {number(uniform)}, dense {number(dense)}."
        )
    if sparse is not None:
        before = f", {number(dense)} before pruning" if dense is not None else ""
        return f"Test perplexity {number(sparse)}{before}."
    search = record.search
    if search.loss is not None and search.uniform_loss is not None:
        return (
            f"Search loss {number(search.loss, 4)} nats per token, uniform {number(search.uniform_loss, 4)}. "
            "No perplexity was measured."
        )
    return ""


@dataclass(frozen=True)
class LevelCount:
    """A level, and the units and weights of a model that have it."""

    name: str
    css: str
    sparsity: Fraction
    servable: bool
    units: int
    weights: int
    share: Fraction


def level_counts(allocation: Allocation) -> list[LevelCount]:
    """Return the levels that occur, densest first."""
    units = Counter(allocation.levels)
    weights: Counter[Level] = Counter()
    for unit, level in zip(allocation.table, allocation.levels, strict=True):
        weights[level] += unit.weights
    return [
        LevelCount(
            name=level.name,
            css=level_class(level),
            sparsity=level.sparsity,
            servable=level.servable,
            units=units[level],
            weights=weights[level],
            share=Fraction(weights[level], allocation.table.weights),
        )
        for level in sorted(units, key=lambda level: (level.sparsity, level.name))
    ]


def _curve(search: SearchRecord, given: Any) -> Chart | None:
    kind = _inside(given, "allocator").get("loss", "kl")
    curve = list(search.curve)
    if curve and search.forward_tokens and (curve[-1][0] or 0) < search.forward_tokens:
        curve.append((search.forward_tokens, curve[-1][1]))  # the lowest loss holds until the end
    uniform = finite_values([search.uniform_loss])
    return draw(
        Chart(
            "Loss against forward tokens",
            "forward tokens",
            _LOSSES.get(str(kind), str(kind)),
            (
                Series("search text, lowest so far", curve, 0, "steps"),
                Series("hold-out text, incumbents", search.holdout, 1, "line"),
            ),
            tuple((value, "uniform") for value in uniform),
            log_x=True,
            caption="The lowest loss so far on the search text, and the incumbents' loss on the hold-out text, both "
            "with the level database's weights. The allocator may return another allocation than the lowest point. "
            "The dashed line is the uniform allocation on the search text.",
        )
    )


def _predictions(search: SearchRecord) -> Chart | None:
    """Return the chart of the measured against the predicted changes of the loss."""
    pairs = finite_pairs(search.predictions)
    rho = rank_correlation(pairs)
    rank = f" Spearman's rank correlation {number(rho, 2)}." if rho is not None else ""
    return draw(
        Chart(
            "Measured against predicted change of the loss",
            "predicted change, nats per token",
            "measured change, nats per token",
            (Series("proposals", pairs, 0),),
            diagonal=True,
            caption=f"{count(len(pairs))} proposals of the search. On the dashed line prediction and measurement "
            f"are equal.{rank}",
        )
    )


def _quality(record: RunRecord) -> list[dict[str, Any]]:
    """Return a row for each measured model: perplexity, loss over dense in nats per token, KL."""
    dense = record.perplexity.get("dense")
    rows = []
    for name in dict.fromkeys([*record.perplexity, *record.kl]):
        value, kl = record.perplexity.get(name), record.kl.get(name)
        if value is None and kl is None:
            continue
        more = None
        if name != "dense" and value is not None and value > 0 and dense and math.isfinite(dense):
            more = math.log(value / dense)
        rows.append({"name": name, "perplexity": value, "more": more, "kl": kl})
    order = {"dense": 0, "uniform": 1, "mixed": 2, "result": 3, "recovered": 4}
    return sorted(rows, key=lambda row: (order.get(row["name"], 5), row["name"]))


def text_facts(text: TextRecord | Mapping[str, Any] | None) -> str:
    """Return a text's provenance as one line."""
    facts = text.model_dump(exclude={"sources"}) if isinstance(text, TextRecord) else text or {}
    parts = [f"{key} {value}" for key, value in sorted(facts.items()) if value is not None]
    return ", ".join(parts) or NOT_RECORDED


def _value(value: Any) -> str:
    """Return a value of a record as text: lists joined with commas, mappings as JSON."""
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _provenance(run: Run) -> list[tuple[str, str]]:
    record, given = run.record, run.allocation.provenance
    model = _inside(given, "model")
    rows = [
        ("Model", record.model.source or NOT_RECORDED),
        ("Model fingerprint", str(model.get("fingerprint", NOT_RECORDED))),
        ("Model dtype", record.model.dtype or NOT_RECORDED),
        ("Levels offered", ", ".join(map(str, given.get("levels") or [NOT_RECORDED]))),
        ("Targets", ", ".join(map(str, given.get("targets") or [NOT_RECORDED]))),
        ("Ignored", ", ".join(map(str, given.get("ignore") or ["nothing"]))),
    ]
    rows += [(key.capitalize(), _value(given[key])) for key in sorted(set(given) - _SHOWN) if given[key]]
    estimators = _inside(given, "estimators")
    rows += [(f"Estimator {name}", spec_text(_inside(estimators, name))) for name in sorted(estimators)]
    rows += [
        ("Calibration text", text_facts(record.calibration or _inside(given, "calibration"))),
        ("Test text", text_facts(record.test)),
        ("Seed", str(given.get("seed", record.seed))),
        ("Time of the run", seconds(record.seconds)),
        ("Python", record.python or NOT_RECORDED),
    ]
    versions = record.versions or _inside(given, "versions")
    return rows + [(name, str(version)) for name, version in sorted(versions.items())]


def _commands(run: Run, *, smaller: bool) -> list[tuple[str, str]]:
    """Return (purpose, command line) of commands to use in the run's directory.

    Args:
        smaller: it can be exported to small.
    """
    record, commands = run.record, []
    if record.command:
        commands.append(("the command of this run", record.command))
    model = "MODEL" if record.model.source is None else shlex.quote(record.model.source)
    method = str(_inside(run.allocation.provenance, "method").get("name", ""))
    recoveries = sum(stage.name == RECOVER for stage in record.stages)
    # a recipe without all of them gives the model before one
    if run.recipe and recoveries <= run.recipe.count("RecoveryModifier") and not _prunes_units(method):
        commands.append(
            ("run the recipe again", f"msp run recipe.yaml --model {model} --data TEXT --out NEW")
        )
    by = "" if method in ("", Options.model_fields["method"].default) else f"-m {shlex.quote(method)} "
    command = f"msp prune {model} {by}--allocation allocation.json --data TEXT --out NEW"
    commands.append(("prune to this allocation", command))
    if run.checkpoint is not None and not run.checkpoint.packed:
        if smaller:
            commands.append(("leave out what does nothing", "msp export . --to small --out ../SMALL"))
        commands.append(("pack it for 2:4 kernels", "msp export . --to sparse24 --out ../PACKED"))
        commands.append(("pack it at any level", "msp export . --to bitmask --out ../PACKED"))
    return commands


def _prunes_units(method: str) -> bool:
    """Return True if a method prunes whole units, as no recipe of llm-compressor can."""
    known = Plugins().components["pruners"].get(method)
    return known is not None and getattr(known.cls, "prune_unit", None) is not Pruner.prune_unit
