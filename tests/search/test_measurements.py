import copy
import json
import re
import time
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from msp_plugin.allocators.base import AllocationResult, Allocator
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import NO_TEXT, TextSplit
from msp_plugin.errors import ModelError, NumericsError, RecipeError
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.layers import prunable_layers
from msp_plugin.passes.gradients import backward_passes
from msp_plugin.passes.losses import mean_kl
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import parse_menu
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.pruning.sparsegpt import SparseGPT
from msp_plugin.pruning.wanda import Wanda
from msp_plugin.runtime.files import cache_directory
from msp_plugin.search import keys, level_database, measurements
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.level_database import open_database
from msp_plugin.search.measurements import Measurements
from msp_plugin.sensitivity import fisher as fisher_module
from msp_plugin.sensitivity import fisher_error
from msp_plugin.sensitivity.base import Estimator, silent
from msp_plugin.sensitivity.fisher import FisherTrace
from msp_plugin.sensitivity.fisher_error import diagonal_groups, fisher_errors
from msp_plugin.sensitivity.kfac_error import kfac_errors

MENU = parse_menu(["dense", "2:4", "1:4"])


@dataclass(frozen=True)
class Zeros(Estimator):
    """The count of zeros: it tells which weights a model holds. It counts its calls."""

    calls: list = field(default_factory=list)
    needs_data = False
    name = "zeros"

    def layer_sensitivities(self, model, data, layers, progress=silent):
        self.calls.append(data)
        progress(1, 1)
        return {name: float((model.get_submodule(name).weight == 0).sum()) for name in layers}


@dataclass(frozen=True)
class Asking(Allocator):
    """Asks for everything, keeps what it was given, and returns uniform."""

    name = "asking"
    needs_database = True
    measures = True
    remeasures = True

    tokens: int = 48
    holdout: int = 24
    errors: tuple[str, ...] = ("weight", "output", "fisher", "kl")
    sensitivities: tuple[str, ...] = ("zeros", "fisher")
    seen: list = field(default_factory=list)

    def allocate(self, inputs):
        uniform = inputs.problem.uniform()
        self.seen.append((inputs, inputs.loss(uniform), inputs.holdout and inputs.holdout(uniform)))
        return AllocationResult(uniform, holdout=((1, float("inf")),), predictions=((0.5, float("inf")),))


@pytest.fixture
def make(llama, tmp_path, make_samples):
    """Measurements of llama with 4 samples for statistics, 4 of search text, and 2 of hold-out."""
    samples = make_samples(10)

    def make(**changes):
        text = TextSplit(
            CalibrationSet(samples.samples[:4], "head"),
            CalibrationSet(samples.samples[4:8], "search"),
            CalibrationSet(samples.samples[8:], "holdout"),
        )
        parts = changes.keys() & {"calibration", "search", "holdout"}
        text = replace(text, **{name: changes.pop(name) for name in parts})
        options = {
            "model": llama, "table": prunable_layers(llama), "menu": MENU, "pruner": Wanda(),
            "text": text,
            "estimators": {"fisher": FisherTrace(), "zeros": Zeros()}, "cache": str(tmp_path / "cache"),
        }  # fmt: skip
        return Measurements(**{**options, **changes})

    return make


@pytest.fixture
def count(monkeypatch):
    """Count the calls of a function that a module imported."""

    def count(module, name):
        calls, original = [], getattr(module, name)

        def counting(*args, **kwargs):
            calls.append(args)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)
        return calls

    return count


def problem_of(held, target=Fraction(1, 2)):
    return AllocationProblem(held.table, held.menu, target)


def times(tmp_path):
    """When the files of the database and of what is measured once were written; journals are per search."""
    return {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "cache").rglob("*")
        if path.suffix in (".safetensors", ".json")
    }


def pruned_copy(held, choice):
    other = copy.deepcopy(held.model)
    with torch.no_grad():
        for unit, k in zip(held.table, choice, strict=True):
            for layer in unit.layers if not held.menu[k].is_dense else ():
                weight = held.database.weight(layer.name, held.menu[k].name)
                other.get_submodule(layer.name).weight.copy_(weight)
    return other


def test_everything_is_measured_once_for_all_allocators_budgets_and_seeds(make, count, tmp_path, bits):
    built, fishers, prints = (
        count(level_database, "build_database"),
        count(measurements, "fisher_errors"),
        count(measurements, "fingerprint"),
    )
    held = make()
    before = bits(held.model)
    asking = Asking()
    held.allocate(asking, problem_of(held), 0)
    files, first = times(tmp_path), asking.seen[0][0]
    zeros = len(held.estimators["zeros"].calls)
    for allocator, target, seed in [
        (Asking(), Fraction(5, 8), 1), (Asking(errors=("fisher", "kl")), Fraction(1, 4), 2),
    ]:  # fmt: skip
        held.allocate(allocator, problem_of(held, target), seed)
        inputs = allocator.seen[0][0]
        assert (inputs.seed, inputs.problem.target) == (seed, target)
        for name, values in inputs.errors.items():
            assert np.array_equal(values, first.errors[name])
        assert {k: v.tolist() for k, v in inputs.sensitivities.items()} == {
            k: v.tolist() for k, v in first.sensitivities.items()
        }
    assert (len(built), len(fishers), len(prints), zeros) == (1, 1, 1, 1)
    assert len(held.estimators["zeros"].calls) == 1 and times(tmp_path) == files
    assert bits(held.model) == before


def test_an_allocator_gets_what_it_asks_for_and_no_more(make):
    held, asking = make(), Asking()
    held.allocate(asking, problem_of(held), 3)
    inputs, loss, stop = asking.seen[0]
    assert set(inputs.sensitivities) == {"zeros", "fisher"}
    assert set(inputs.errors) == {"weight", "output", "fisher", "kl"}
    assert all(error.shape == (8, 3) for error in inputs.errors.values())
    assert inputs.loss.lengths == (24, 24) and inputs.holdout.lengths == (24,)
    pruned = pruned_copy(held, inputs.problem.uniform())
    for value, samples in ((loss, held.text.search.samples[-2:]), (stop, held.text.holdout.samples[-1:])):
        assert value == pytest.approx(mean_kl(held.model, pruned, CalibrationSet(samples, "")), rel=1e-4)
    few = Asking(errors=("weight",), tokens=10, holdout=0)
    held.allocate(few, problem_of(held), 0)
    inputs = few.seen[0][0]
    assert list(inputs.errors) == ["weight"] and inputs.loss.lengths == (24,) and inputs.holdout is None


def test_an_allocator_that_asks_for_nothing_measures_nothing(make, tmp_path, bits):
    class Plain(Allocator):
        name = "plain"

        def allocate(self, inputs):
            assert (inputs.loss, inputs.holdout, inputs.estimate) == (None, None, None)
            assert inputs.errors == inputs.sensitivities == {}
            return AllocationResult(inputs.problem.uniform())

    held = make(text=TextSplit())
    _, record = held.allocate(Plain(), problem_of(held), 0)
    assert record.forward_tokens == 0 and not (tmp_path / "cache").exists()
    assert held.estimators["zeros"].calls == []


def test_the_record_counts_every_token_and_is_json(make):
    held, asking = make(), Asking()
    _, record = held.allocate(asking, problem_of(held), 0)
    assert record.forward_tokens == (1 + 8 * 2) * 48 + 48 + 24  # replace-one, search, hold-out
    record = record.to_dict()
    assert record["holdout"] == [[1, None]] and record["predictions"] == [[0.5, None]]
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_every_pass_for_the_fisher_weighted_error_is_counted(make, monkeypatch):
    held = make()
    once = held.sensitivity_tokens(Asking(sensitivities=()))
    monkeypatch.setattr(
        measurements, "diagonal_groups", lambda model, layers: diagonal_groups(model, layers, 20_000)
    )
    groups = len(measurements.diagonal_groups(held.model, [layer.name for layer in held.table.layers]))
    assert groups > 3 and held.sensitivity_tokens(Asking(sensitivities=())) == groups * once


def test_the_kfac_error_is_the_fisher_weighted_one_where_a_method_gives_no_rows(make):
    held, allocator = make(pruner=Magnitude()), Asking(errors=("kfac",), sensitivities=())
    assert np.array_equal(held.error("kfac"), held.error("fisher"))
    assert held.sensitivity_tokens(allocator) == held.sensitivity_tokens(
        replace(allocator, errors=("fisher",))
    )


def test_the_kfac_error_costs_one_backward_pass_over_the_samples(make):
    held = make()
    allocator = Asking(errors=("kfac",), sensitivities=())
    assert allocator.estimators == ("fisher",)
    assert held.sensitivity_tokens(allocator) == 3 * held.text.calibration.tokens


def test_a_second_object_reads_the_kfac_error_from_disk(make, monkeypatch):
    first = make().error("kfac")
    monkeypatch.delattr("msp_plugin.sensitivity.kfac_error.backward_passes")
    assert np.array_equal(make().error("kfac"), first)


def test_a_fisher_weighted_error_that_is_not_finite_is_named(make, monkeypatch):
    def errors(*args, **kwargs):
        found = fisher_errors(*args, **kwargs)
        return {**found, "model.layers.1.mlp.down_proj": {"2:4": float("nan"), "1:4": 1.0}}

    monkeypatch.setattr(measurements, "fisher_errors", errors)
    with pytest.raises(
        NumericsError, match=r"not finite for 1 layers, e\.g\. model\.layers\.1\.mlp\.down_proj"
    ):
        make().error("fisher")


def test_code_that_measures_differently_reads_nothing_of_the_old(make, count, monkeypatch):
    calls = count(measurements, "fisher_errors")
    for code in ("", "edited", "edited"):
        if code:
            monkeypatch.setattr(keys, "measuring_code", lambda: "edited")
        make().error("fisher")
    assert len(calls) == 3  # each object asks; what is measured is in the journals
    names = {path.name for path in cache_directory(make().cache).rglob("fisher-error-*.jsonl")}
    assert len(names) == 2


def test_the_replace_one_kl_is_that_of_one_pruned_unit(make, bits):
    held = make()
    before = bits(held.model)
    found, measured = held.replace_one(48)
    assert bits(held.model) == before and measured.forward_tokens == 17 * 48
    part = CalibrationSet(held.text.search.samples[-2:], "")
    for u in range(8):
        for k in range(3):
            choice = tuple(k if v == u else 0 for v in range(8))
            expected = mean_kl(held.model, pruned_copy(held, choice), part)
            assert found[u, k] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert (found[:, 0] == 0).all() and (found[:, 1:] > 1e-4).all()


def test_the_replace_one_kl_needs_no_dense_level_in_the_menu(make):
    with_dense, _ = make().replace_one(48)
    without, _ = make(menu=MENU[1:]).replace_one(48)
    assert without.shape == (8, 2) and without == pytest.approx(with_dense[:, 1:], rel=1e-6)


def test_errors_by_layer_are_summed_over_the_unit(make):
    held = make()
    layers = [layer.name for layer in held.table.layers]
    names = [level.name for level in MENU if not level.is_dense]

    def expected(samples):
        data = CalibrationSet(held.text.calibration.samples[:samples], "")
        found = fisher_errors(held.model, data, layers, names, held.database.weight)
        return np.array(
            [[0.0, *(sum(found[a.name][name] for a in unit.layers) for name in names)] for unit in held.table]
        )

    def expected_kfac():
        data = CalibrationSet(held.text.calibration.samples[:4], "")
        found = kfac_errors(held.model, data, layers, names, held.database.row_errors)
        return np.array(
            [[0.0, *(sum(found[a.name][name] for a in unit.layers) for name in names)] for unit in held.table]
        )

    assert held.error("kfac") == pytest.approx(expected_kfac(), rel=1e-6)
    assert held.error("fisher") == pytest.approx(expected(4), rel=1e-6)
    assert make(estimators={"fisher": FisherTrace(samples=2)}).error("fisher") == pytest.approx(
        expected(2), rel=1e-6
    )
    assert not np.allclose(expected(2), expected(4), rtol=1e-3)
    weight, output = held.database.errors(held.table)
    assert np.array_equal(held.error("weight"), weight) and np.array_equal(held.error("output"), output)
    assert not np.array_equal(weight, output)


@pytest.fixture
def passes(monkeypatch):
    """Count the backward passes over samples."""
    calls = []

    def counting(model, data, *rest):
        calls.append(len(data))
        return backward_passes(model, data, *rest)

    monkeypatch.setattr(fisher_module, "backward_passes", counting)
    monkeypatch.setattr(fisher_error, "backward_passes", counting)
    return calls


def test_a_second_object_reads_from_disk_what_the_first_measured(make, count, passes, tmp_path):
    def ask(held):
        kl, measured = held.replace_one(48)
        return held.error("fisher"), kl, measured.forward_tokens, held.sensitivity("fisher")

    expected, files = ask(make()), times(tmp_path)
    passes.clear()
    losses = count(measurements, "CandidateLoss")
    found = ask(make())
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
    assert found[2:] == expected[2:] and not passes and not losses and times(tmp_path) == files


def test_a_sensitivity_that_was_stopped_goes_on_with_the_next_samples(
    make, make_samples, monkeypatch, passes
):
    monkeypatch.setattr("msp_plugin.sensitivity.base.TOGETHER", 2)
    expected = make().sensitivity("fisher")
    assert passes == [1] * 4

    def stop(step, done, total):
        if done == 2:
            raise KeyboardInterrupt

    passes.clear()
    with pytest.raises(KeyboardInterrupt):
        make(progress=stop, fresh=True).sensitivity("fisher")
    assert passes == [1] * 2
    assert make().sensitivity("fisher") == expected and passes == [1] * 4


@pytest.mark.parametrize("name", ["fisher-error", "fisher", "replace-one"])
@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[1, 2]\n", lambda text: "\0\xff\n",
    lambda text: text.replace('"value"', '"lost"'), lambda text: re.sub(r"(\d)e", r"\g<1>1e", text),
], ids=["cut", "empty", "a list", "binary", "renamed", "digits"])  # fmt: skip
def test_a_file_that_is_damaged_is_measured_anew(make, tmp_path, name, damage, caplog):
    def ask(held):
        return {
            "fisher-error": lambda: held.error("fisher"), "fisher": lambda: held.sensitivity("fisher"),
            "replace-one": lambda: held.replace_one(24)[0],
        }[name]()  # fmt: skip

    expected = ask(make())
    (path,) = (tmp_path / "cache").rglob(f"{name}-????????????????.jsonl")
    text = path.read_text()
    path.write_text(damage(text), encoding="latin-1")
    changed = path.read_bytes() != text.encode()
    assert np.array_equal(ask(make()), expected)
    values = [re.sub(r'^\w+ |"seconds": [\d.e-]+', "", line) for line in path.read_text().splitlines()]
    assert values == [re.sub(r'^\w+ |"seconds": [\d.e-]+', "", line) for line in text.splitlines()]
    assert (str(path) in caplog.text) == (
        changed and path.read_bytes()[-1:] == b"\n" and damage(text)[-1:] == "\n"
    )


def test_other_text_units_or_method_are_measured_on_their_own(make, count, make_samples, tmp_path):
    calls = count(measurements, "fisher_errors")
    make().error("fisher")
    other = make_samples(4, seed=3)
    changes = [
        {"estimators": {"fisher": FisherTrace(samples=3)}}, {"calibration": other}, {"pruner": Magnitude()},
        {"pruner": Magnitude(), "calibration": other}, {"menu": MENU[1:]},
    ]  # fmt: skip
    for number, change in enumerate(changes, 2):
        make(**change).error("fisher")
        assert len(calls) == number
    make().replace_one(24)
    make().replace_one(48)
    make(search=other).replace_one(24)
    by_layer = prunable_layers(make().model, granularity="layer")
    assert make(table=by_layer).replace_one(24)[0].shape == (14, 3)
    assert len(list((tmp_path / "cache").rglob("replace-one-*.jsonl"))) == 4


def test_an_estimate_is_that_of_the_pruned_model(make, bits):
    held = make()
    before = bits(held.model)
    found = []

    class Remeasuring(Asking):
        def allocate(self, inputs):
            uniform, sparser = inputs.problem.uniform(), (2,) * 8
            for choice in (uniform, (0,) * 8, sparser):
                found.append((choice, inputs.estimate("zeros", choice), inputs.estimate("fisher", choice)))
            assert inputs.loss((0,) * 8) == pytest.approx(0.0, abs=1e-6)
            return AllocationResult(uniform)

    held.allocate(Remeasuring(errors=()), problem_of(held), 0)
    kept = problem_of(held).kept
    sizes = np.array([unit.weights for unit in held.table])
    for choice, zeros, fisher in found:
        assert zeros.tolist() == (sizes - kept[np.arange(8), list(choice)]).tolist()
        pruned = make(model=pruned_copy(held, choice))
        assert fisher == pytest.approx(np.array(pruned.sensitivity("fisher")), rel=1e-4)
    assert held.sensitivities["zeros"] == (0.0,) * 8 and bits(held.model) == before


def test_the_dense_weights_are_back_when_an_allocator_fails(make, bits, count_hooks):
    held = make()
    before, hooks = bits(held.model), count_hooks(held.model)

    class Failing(Asking):
        def allocate(self, inputs):
            inputs.loss.set_incumbent((1,) * 8)
            inputs.loss((1,) * 8)
            inputs.estimate("fisher", (2,) * 8)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        held.allocate(Failing(errors=()), problem_of(held), 0)
    assert bits(held.model) == before and count_hooks(held.model) == hooks


def test_an_unknown_error_or_sensitivity_is_refused_with_the_known_ones(make):
    with pytest.raises(RecipeError, match="there is no error 'fischer'") as error:
        make().error("fischer")
    assert "did you mean 'fisher'" in error.value.hint
    with pytest.raises(RecipeError, match="there is no error 'x'"):
        held = make()
        held.allocate(Asking(errors=("x",)), problem_of(held), 0)
    with pytest.raises(RecipeError, match="there is no estimator 'fischer'") as error:
        make().sensitivity("fischer")
    assert "did you mean 'fisher'" in error.value.hint


def test_text_that_is_missing_is_named_before_any_work(make, tmp_path):
    for search in (NO_TEXT, CalibrationSet((), "empty")):
        held = make(search=search)
        with pytest.raises(RecipeError, match="allocator 'asking' needs search text"):
            held.allocate(Asking(), problem_of(held), 0)
        with pytest.raises(RecipeError, match="needs search text"):
            held.replace_one(24)
    for calibration in (NO_TEXT, CalibrationSet((), "empty")):
        held = make(calibration=calibration)
        with pytest.raises(RecipeError, match="sensitivity 'fisher' needs calibration text"):
            held.sensitivity("fisher")
        assert held.sensitivity("zeros") == (0.0,) * 8
    assert not (tmp_path / "cache/database").exists()


def test_weights_that_no_hook_loads_are_refused_before_any_work(make):
    held = make()
    held.model.lm_head = torch.nn.Linear(64, 128, bias=False, device="meta")
    with pytest.raises(ModelError, match="offloaded"):
        held.allocate(Asking(), problem_of(held), 0)
    assert held.estimators["zeros"].calls == [] and held.sensitivities == {}


def test_steps_report_their_progress(make):
    seen = {}
    held = make(progress=lambda step, done, total, note="": seen.setdefault(step, []).append((done, total)))
    held.allocate(Asking(), problem_of(held), 0)
    assert {step: at[-1] for step, at in seen.items()} == {
        "sensitivity, zeros": (1, 1), "sensitivity, fisher": (4, 4), "level database": (14, 14),
        "Fisher-weighted error": (4, 4), "replace-one KL": (8, 8),
    }  # fmt: skip


def test_the_objective_is_the_allocators(make):
    @dataclass(frozen=True)
    class Perplexity(Asking):
        loss: str = "perplexity"

    held, asking = make(), Perplexity(errors=())
    held.allocate(asking, problem_of(held), 0)
    _, loss, holdout = asking.seen[0]
    kl = Asking(errors=())
    held.allocate(kl, problem_of(held), 0)
    assert loss > 3 > kl.seen[0][1] and holdout > 3 > kl.seen[0][2]  # of 128 tokens, one takes about log(128)


def test_a_database_is_named_by_what_its_weights_depend_on(llama, qwen2, make_samples, tmp_path, monkeypatch):
    data, other, cache = make_samples(), make_samples(seed=1), str(tmp_path)

    def key(model=llama, samples=data, pruner=SparseGPT(), menu=MENU):
        return open_database(fingerprint(model), samples, pruner, menu, cache).key

    def held(batch_tokens=64, device="cpu"):
        made = open_database(
            fingerprint(llama), data, SparseGPT(), MENU, cache, batch_tokens=batch_tokens, device=device
        )
        return made.key

    assert len({held(), held(128), held(device="cuda")}) == 3  # sums of other batches round otherwise
    before = held()
    monkeypatch.setattr(keys, "measuring_code", lambda: "other code")
    assert held() != before
    monkeypatch.undo()
    found = [
        key(), key(qwen2), key(samples=other), key(pruner=replace(SparseGPT(), dampening_frac=0.02)),
        key(pruner=Wanda()), key(menu=MENU[:2]),
    ]  # fmt: skip
    assert len(set(found)) == len(found) and key() == found[0]
    assert key(pruner=Magnitude()) == key(pruner=Magnitude(), samples=other)  # it needs no statistics


def test_what_an_estimate_rests_on_is_part_of_its_journal(make, make_samples):
    class Remeasuring(Asking):
        def allocate(self, inputs):
            self.seen.append(inputs.estimate("fisher", inputs.problem.uniform()))
            return AllocationResult(inputs.problem.uniform())

    def ask(**changes):
        held, allocator = (
            make(pruner=Magnitude(), **changes),
            Remeasuring(errors=(), sensitivities=("fisher",)),
        )
        held.allocate(allocator, problem_of(held), 0)
        return allocator.seen[0].tolist()

    first = ask()
    assert ask() == first
    assert ask(estimators={"fisher": FisherTrace(samples=2)}) != first
    assert ask(calibration=make_samples(4, seed=9)) != first


def test_a_search_that_is_read_from_its_journal_has_the_time_that_it_had_taken(make, monkeypatch):
    late, now, loss = [0.0], time.monotonic, CandidateLoss.__call__

    def slow(self, *args):
        late[0] += 1000.0
        return loss(self, *args)

    monkeypatch.setattr(time, "monotonic", lambda: now() + late[0])
    monkeypatch.setattr(CandidateLoss, "__call__", slow)

    class Timed(Asking):
        def allocate(self, inputs):
            began = inputs.clock()
            inputs.loss(inputs.problem.uniform())
            self.seen.append(inputs.clock() - began)
            return AllocationResult(inputs.problem.uniform())

    taken = []
    for _ in range(2):
        held, allocator = make(), Timed(errors=(), sensitivities=())
        held.allocate(allocator, problem_of(held), 0)
        taken += allocator.seen
    assert late == [1000.0] and [round(seconds, -3) for seconds in taken] == [1000.0, 1000.0]
