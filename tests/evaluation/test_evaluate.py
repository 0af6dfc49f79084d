"""`msp eval`: tasks of lm-eval against log-likelihoods by hand, perplexity and KL, and what it refuses."""

import importlib.util
import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from msp_plugin.cli.stopping import Stopped
from msp_plugin.data.sources import load_texts
from msp_plugin.data.tokenize import tokenize
from msp_plugin.errors import HostError
from msp_plugin.evaluation.lm_eval_run import Metric, difference
from msp_plugin.evaluation.tasks import local_tasks, require_lm_eval
from msp_plugin.models.load import load_model
from msp_plugin.models.source import load_tokenizer
from msp_plugin.passes.losses import perplexity
from msp_plugin.records.evaluation import EvalRecord

TASKS = Path(__file__).parents[2] / "integration" / "tasks"
TASK = "which_line_follows"
MINE = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
"""

needs_lm_eval = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "accelerate")),
    reason="lm-eval (extra: eval) is not installed: no task is asked here; integration/eval_demo.py does it",
)


@pytest.fixture(autouse=True)
def no_list_of_packages(monkeypatch):
    """Spare lm-eval's list of what is installed, which no record holds and which takes half a second."""
    monkeypatch.setattr("torch.utils.collect_env.get_pip_packages", lambda *given: ("pip", ""))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat, and the dog sat on the log.\n" * 60)
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Fails if weights are read."""

    def load(*given, **more):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("msp_plugin.evaluation.evaluate.load", load)


@pytest.fixture
def no_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)


@pytest.fixture
def task_dir(tmp_path):
    """Write a directory with one task file and return it."""

    def make(text, name="mine.yaml"):
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / name).write_text(text)
        return tmp_path / "tasks"

    return make


def by_hand(model, tokenizer, context, choice):
    """Return the log-likelihood of a choice after a context: one sequence, no batch, no padding."""
    start = len(tokenizer(context.rstrip()).input_ids)  # the space between the two belongs to the choice
    ids = torch.tensor([tokenizer(context + choice).input_ids])
    with torch.no_grad():
        scores = model(ids).logits[0].log_softmax(-1)
    return sum(float(scores[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))


@needs_lm_eval
def test_accuracies_are_those_of_log_likelihoods_by_hand(msp):
    printed = msp(
        "eval", "demo:qwen2", "--tasks", TASK, "--task-dir", TASKS, "--limit", "20", "--dtype", "float32", "--json"
    )  # fmt: skip
    record = json.loads(printed.out)["tasks"][TASK]
    from msp_plugin.demo import demo_model_path

    path = demo_model_path("qwen2")
    model, tokenizer = load_model(path, "float32"), load_tokenizer(path)
    right = {"acc": [], "acc_norm": []}
    for line in (TASKS / f"{TASK}.jsonl").read_text().splitlines()[:20]:
        item = json.loads(line)
        scores = [by_hand(model, tokenizer, item["context"], choice) for choice in item["choices"]]
        normed = [score / len(choice) for score, choice in zip(scores, item["choices"], strict=True)]
        right["acc"].append(scores.index(max(scores)) == item["answer"])
        right["acc_norm"].append(normed.index(max(normed)) == item["answer"])
    found = {metric["name"]: metric for metric in record["metrics"]}
    assert set(found) == set(right) and record["samples"] == 20 and record["available"] == 200
    for name, hits in right.items():
        p = sum(hits) / 20
        assert found[name]["value"] == p, name
        assert found[name]["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 19)), name


@needs_lm_eval
def test_a_packed_checkpoint_scores_as_its_dense_form_and_the_same_command_gives_the_same_bytes(
    msp, run_dir, packed_dir, tmp_path
):
    common = ("--tasks", TASK, "--task-dir", TASKS, "--limit", "3", "--num-fewshot", "1", "--json")
    dense = json.loads(msp("eval", run_dir, *common).out)
    again = [msp("eval", packed_dir, *common, "--out", tmp_path / f"{i}.json") for i in range(2)]
    packed = json.loads(again[0].out)
    assert packed["model"].pop("source") == str(packed_dir) != dense["model"].pop("source")
    assert packed == dense
    assert again[0].out == again[1].out and json.loads(again[0].out) == json.loads(
        (tmp_path / "0.json").read_text()
    )
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    assert packed["tasks"][TASK]["num_fewshot"] == 1 and packed["harness"]["limit"] == 3
    assert str(TASKS) not in again[0].out and str(tmp_path) not in again[0].out


@needs_lm_eval
def test_under_json_the_console_shows_no_bar_and_no_log_of_lm_eval_and_what_is_cut_is_said(msp, run_dir):
    shown = msp("eval", run_dir, "--tasks", TASK, "--task-dir", TASKS, "--limit", "3", "--json")
    json.loads(shown.out)
    bars = [line for line in shown.err.replace("\r", "\n").split("\n") if "%|" in line]
    assert all("Loading weights" in bar for bar in bars)  # transformers' own
    assert "pretrained" not in shown.err
    # 128 tokens are less than an item has
    assert "their beginnings were cut off" in " ".join(shown.err.split())


@needs_lm_eval
def test_a_reference_is_asked_the_same_and_the_difference_is_of_pairs(msp, run_dir, llama_dir, tmp_path):
    common = ("--tasks", TASK, "--task-dir", TASKS, "--limit", "4", "--json")
    record = json.loads(msp("eval", run_dir, "--reference", llama_dir, *common).out)
    alone = json.loads(msp("eval", llama_dir, *common).out)
    for row, single in zip(record["tasks"][TASK]["metrics"], alone["tasks"][TASK]["metrics"], strict=True):
        assert row["reference"] == single["value"] and row["paired"]
        assert row["difference"] == row["value"] - row["reference"]
    assert record["reference"]["fingerprint"] == alone["model"]["fingerprint"]
    file = tmp_path / "same.json"
    table = msp("eval", llama_dir, "--reference", llama_dir, *common[:-1], "--out", file).out
    assert "acc_norm" in table and "difference" in table
    same = json.loads(file.read_text())["tasks"][TASK]["metrics"]
    assert all(m["difference"] == m["difference_stderr"] == 0 for m in same)


def test_the_difference_of_means_has_the_error_of_its_pairs_and_of_others_that_of_independent_numbers():
    ours = Metric("t", "acc", "none", 0.5, 0.3, True, (1.0, 0.0, 1.0, 0.0))
    theirs = Metric("t", "acc", "none", 0.75, 0.4, True, (1.0, 1.0, 1.0, 0.0))
    assert difference(ours, theirs) == (-0.25, 0.25, True)  # of 0, -1, 0, 0: deviation 0.5, by sqrt(4)
    alone = Metric("t", "f1", "none", 0.75, 0.4, True)
    assert difference(ours, alone) == (-0.25, 0.5, False)
    assert difference(Metric("t", "f1", "none", 0.5, None, True), alone) == (-0.25, None, False)


@needs_lm_eval
def test_a_metric_that_is_not_finite_in_a_document_has_no_difference(msp, llama_dir, task_dir, tmp_path):
    rows = [{"context": "The cat", "choices": [" sat", " log"], "answer": i % 2} for i in range(4)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task_dir("def score(doc, results):\n    return {'odd': float('-inf' if doc['answer'] else 'inf'), 'all': float('inf')}\n",
             "mine.py")  # fmt: skip
    metrics = "".join(
        f"{{metric: {name}, aggregation: mean, higher_is_better: true}}, " for name in ("odd", "all")
    )
    directory = task_dir(
        MINE % (tmp_path / "items.jsonl")
        + f"process_results: !function mine.score\nmetric_list: [{metrics}]\n"
    )
    common = ("--reference", llama_dir, "--tasks", "mine", "--task-dir", directory, "--json")
    found = json.loads(msp("eval", llama_dir, *common).out)["tasks"]["mine"]["metrics"]
    assert {metric["name"] for metric in found} == {"odd", "all"}
    for metric in found:
        assert (metric["difference"], metric["difference_stderr"], metric["paired"]) == (None, None, False)


def test_perplexity_and_kl_need_no_lm_eval(msp, no_lm_eval, run_dir, llama_dir, text_file):
    common = ("--data", text_file, "--samples", "4", "--length", "32", "--json")
    record = json.loads(msp("eval", run_dir, "--reference", llama_dir, *common).out)
    (text,) = record["perplexity"]
    samples = tokenize(
        load_tokenizer(run_dir), load_texts(str(text_file)), samples=4, length=32, source="", at_least=1
    )
    assert (
        text["value"] == perplexity(load_model(run_dir), samples)
        and text["fingerprint"] == samples.fingerprint
    )
    assert text["reference"] == perplexity(load_model(llama_dir), samples)
    assert text["kl"] > 0 and record["tasks"] == {} and record["harness"] is None
    assert record["schema"] == "msp_plugin/eval" and "lm_eval" not in record["versions"]
    same = json.loads(msp("eval", run_dir, "--reference", run_dir, "--data", text_file, *common).out)
    assert [text["kl"] for text in same["perplexity"]] == [0, 0]


def test_a_reference_with_another_tokenizer_has_no_kl(msp, no_model, run_dir, text_file):
    said = msp(
        "eval", run_dir, "--reference", "demo:llama", "--data", text_file, "--length", "32", code=2
    ).err
    assert "demo:llama" in said and "different tokens" in said


def test_a_reference_that_is_cut_off_is_named_before_a_model_is_loaded(
    msp, no_model, run_dir, copied, text_file
):
    weights = copied(run_dir, "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    said = msp("eval", run_dir, "--reference", weights.parent, "--data", text_file, code=1).err
    assert "model.safetensors is not a complete safetensors file" in said


def test_the_models_own_scores_are_delivered_if_the_reference_cannot_be_loaded(
    msp, run_dir, copied, text_file, tmp_path
):
    config = copied(run_dir, "other") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 8}))
    common = ("--data", text_file, "--samples", "4", "--length", "32")
    alone = json.loads(msp("eval", run_dir, *common, "--json").out)
    file = tmp_path / "eval.json"
    shown = msp("eval", run_dir, "--reference", config.parent, *common, "--out", file, code=2)
    assert str(config.parent) in shown.err and f"Written: {file}" in shown.out
    assert json.loads(file.read_text()) == alone


def test_a_stopped_evaluation_writes_nothing(msp, run_dir, text_file, tmp_path, monkeypatch):
    def stop(request, so_far, **_):
        so_far(EvalRecord())
        raise Stopped(130)

    monkeypatch.setattr("msp_plugin.evaluation.evaluate.evaluate", stop)
    file = tmp_path / "eval.json"
    shown = msp("eval", run_dir, "--data", text_file, "--out", file, code=130)
    assert "Written" not in shown.out and not file.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to evaluate on", "name tasks", "give data"]),
        (["--tasks", "x", "--limit", "-1"], ["limit = -1"]),
        (["--tasks", "x", "--limit", "0"], ["limit = 0", "at least 1"]),
        (["--tasks", "x", "--num-fewshot", "-1"], ["num_fewshot = -1"]),
        (["--tasks", "x", "--batch", "0"], ["batch = 0"]),
        (["--tasks", "x", "--dtype", "int8"], ["dtype 'int8' is unknown"]),
        (["--tasks", "x", "--task-dir", "/nowhere"], ["no directory of tasks at /nowhere"]),
        (["--tasks", "x", "--task-dir", "~/nowhere"], [f"no directory of tasks at {Path.home()}/nowhere"]),
        (["--tasks", "x", "--task-dir", "."], ["holds no .yaml file"]),
        (["--task-dir", str(TASKS)], ["no task of it", TASK]),
        (["--data", "/nowhere/text.txt"], ["no data file at /nowhere/text.txt"]),
        (["--data", "demo:test", "--length", "500"], ["samples of 500 tokens", "takes 128 at most"]),
        (["--data", "demo:test", "--out", "taken.json"], ["taken.json exists"]),
        (["--data", "demo:test", "--out", "taken.json/eval.json"], ["taken.json is a file"]),
    ],
)  # fmt: skip
def test_bad_input_is_explained_before_a_model_is_loaded(
    msp, no_model, llama_dir, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.json").write_text("precious")
    said = msp("eval", llama_dir, *arguments, code=2).err
    assert "error: " in said and "Traceback" not in said
    assert all(word in said for word in words), said
    assert (tmp_path / "taken.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: [mine\n", ["mine.yaml is not YAML that lm-eval reads"]),
        ("task: !fun mine.load\n", ["mine.yaml is not YAML that lm-eval reads", "!fun"]),
        ("- task: mine\n", ["mine.yaml holds no mapping"]),
        ("output_type: multiple_choice\n", ["no .yaml file of", "defines a task"]),
    ],
)
def test_a_broken_task_file_is_named_without_lm_eval(
    msp, no_model, no_lm_eval, llama_dir, task_dir, text, words
):
    said = msp("eval", llama_dir, "--tasks", "mine", "--task-dir", task_dir(text), code=2).err
    assert all(word in said for word in words), said


def test_without_lm_eval_tasks_are_refused_and_the_extra_is_named(msp, no_model, no_lm_eval, llama_dir):
    said = msp("eval", llama_dir, "--tasks", TASK, "--task-dir", TASKS, code=1).err
    assert "lm-eval, which is not installed" in said and "pip install 'msp_plugin[eval]'" in said
    with pytest.raises(HostError, match="not installed"):
        require_lm_eval()


def test_a_missing_model_is_named_before_tasks_are_looked_for(msp, no_lm_eval):
    assert "no model directory at /nowhere" in msp("eval", "/nowhere/model", "--tasks", "x", code=2).err


@needs_lm_eval
@pytest.mark.slow
def test_a_task_that_is_not_there_is_answered_with_near_ones(msp, no_model, llama_dir):
    said = msp("eval", llama_dir, "--tasks", "arc_eazy", code=2).err
    assert "there is no task 'arc_eazy'" in said and "arc_easy" in said and "a task directory adds" in said


@needs_lm_eval
def test_a_task_that_is_not_in_the_directory_is_answered_with_those_that_are(
    msp, no_model, llama_dir, monkeypatch
):
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager  # without lm-eval's own tasks, which take seconds to find
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda **given: manager(**{**given, "include_defaults": False})
    )
    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", manager.load, raising=False)
    said = msp("eval", llama_dir, "--tasks", f"{TASK[:-1]}", "--task-dir", TASKS, code=2).err
    assert f"there is no task {TASK[:-1]!r}" in said
    assert f"near it: {TASK}; " in said and "defines which_line_follows" in said


@needs_lm_eval
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINE % "/nowhere/items.jsonl", ["dataset of task 'mine' could not be loaded", "/nowhere/items.jsonl"]),
        ("task: mine\ndataset_path: nobody/nothing\n", ["dataset of task 'mine' could not be loaded", "in a task directory"]),
        (MINE % "x" + "colour: red\n", ["cannot build task 'mine'", "colour"]),
        (MINE % "x" + "process_docs: !function absent.f\n", ["cannot build task 'mine'", "absent"]),
        (MINE % "x" + "metric_list: [{metric: acc}]\nunsafe_code: true\ncustom_dataset: !function mine.load\n",
         ["'mine' runs code that the model writes"]),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_built_is_named_before_a_model_is_loaded(
    msp, no_model, llama_dir, task_dir, text, words
):
    task_dir("def load(**_):\n    import datasets\n    row = {'context': 'a', 'choices': ['b', 'c'], 'answer': 0}\n"
             "    return {'test': datasets.Dataset.from_list([row])}\n", "mine.py")  # fmt: skip
    shown = msp("eval", llama_dir, "--tasks", "mine", "--task-dir", task_dir(text), "--json", code=2)
    assert all(word in shown.err for word in words), shown.err
    assert shown.out == "" and "Traceback" not in shown.err


@needs_lm_eval
def test_a_task_of_a_local_file_with_a_metric_that_is_no_mean(
    msp, llama_dir, task_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("msp_plugin.evaluation.lm_eval_run.BOOTSTRAP", 20)  # for the error of mcc
    rows = [{"context": "The cat sat on the", "choices": [" mat", " log"], "answer": i % 2} for i in range(6)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = MINE % (tmp_path / "items.jsonl") + "num_fewshot: 0\nmetric_list: [{metric: mcc}, {metric: acc}]\n"
    directory = task_dir(text)
    shown = msp(
        "eval", llama_dir, "--reference", llama_dir, "--tasks", "mine,mine", "--task-dir", directory,
        "--num-fewshot", "2", "--json",
    )  # fmt: skip
    record = json.loads(shown.out)["tasks"]["mine"]
    found = {metric["name"]: metric for metric in record["metrics"]}
    assert found["acc"]["value"] == 0.5 and found["acc"]["paired"] and not found["mcc"]["paired"]
    assert record["num_fewshot"] == 0 and "takes no examples" in shown.err


def test_the_items_of_the_task_are_sound():
    assert local_tasks(TASKS) == {TASK: "task"}
    items = [json.loads(line) for line in (TASKS / f"{TASK}.jsonl").read_text().splitlines()]
    assert len(items) == 200 and Counter(item["answer"] for item in items) == dict.fromkeys(range(4), 50)
    assert len({(item["file"], item["line"]) for item in items}) == 200
    for item in items:
        choices = item["choices"]
        assert len(set(choices)) == 4 and item["context"].endswith("\n") and item["context"].strip()
        assert len({len(choice) - len(choice.lstrip()) for choice in choices}) == 1
        true = choices[item["answer"]]
        assert all(abs(len(choice) - len(true)) <= 3 for choice in choices)


def test_items_are_a_function_of_the_texts():
    spec = importlib.util.spec_from_file_location("which_line_follows", TASKS / f"{TASK}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts = {f"{name}.py": "".join(f"value_{name}_{i:02} = {i:02}\n" for i in range(20)) for name in "abcd"}
    items = module.make(texts, 12, seed=1)
    assert items == module.make(dict(reversed(texts.items())), 12, seed=1) and len(items) == 12
    for item in items:
        true = item["choices"][item["answer"]]
        assert texts[item["file"]].splitlines()[item["line"] - 1] == true
        assert item["context"] + true in texts[item["file"]]
        assert not any(choice in texts[item["file"]] for choice in item["choices"] if choice != true)
