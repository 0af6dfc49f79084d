"""run.json, compare.json and eval.json: what is written is read back, older files too, and newer ones are refused."""

import json
import math
from pathlib import Path

import pytest

import msp_plugin.records
from msp_plugin.errors import RecipeError
from msp_plugin.records.__main__ import RECORDS, readme
from msp_plugin.records.comparison import ComparedRow, CompareRecord, LayerRecord, UnitRecord
from msp_plugin.records.evaluation import EvalRecord, HarnessRecord, MetricScore, TaskScore, TextScore
from msp_plugin.records.parts import ModelRecord, QualityRecord, ReadingRecord, SearchRecord, TextRecord
from msp_plugin.records.run import RunRecord, SparsityRecord, StageRecord
from msp_plugin.recovery.record import Recovered, with_recovery

#: As version 1 wrote it: a run on the embedded Qwen2-type model with a small search.
RUN_V1 = Path(__file__).parent / "run_v1.json"

READING = ReadingRecord(source="a.txt", samples=4, columns=("text",), rows=9, skipped=1, bos="<s>")
TEXT = TextRecord(
    source="a.txt", samples=4, length=16, tokens=64, seed=0, fingerprint="ab", sources=(READING,)
)
SEARCH = {"forward_tokens": 4096, "evaluations": 7, "curve": ((512, 0.6), (4096, 0.4)), "notes": ("a note",)}
WRITTEN = {
    "run": RunRecord(
        stages=(
            StageRecord(name="dense", perplexity=12.0),
            StageRecord(name="prune", perplexity=15.5, seconds=3.25, sparsity=0.75),
        ),
        sparsity=SparsityRecord(target=0.75, exact=True, zeros=96, weights=128),
        perplexity={"dense": 12.0, "uniform": None, "mixed": 15.5},
        search=SearchRecord(allocator="search", **SEARCH),
        model=ModelRecord(source="org/model", dtype="auto"),
        calibration=TEXT,
        seed=3,
        versions={"torch": "2"},
    ),
    "comparison": CompareRecord(
        units=(UnitRecord(name="u", block=0, weights=32, layers=(LayerRecord(name="l", shape=(4, 8)),)),),
        dense=QualityRecord(perplexity=12.0),
        bounds={"*up_proj": ("1/10", "2/3")},
        texts={"test": TEXT},
        sensitivities={"fisher": (0.5,)},
        rows=(
            ComparedRow(
                method="wanda", sparsity="3/4", allocator="a[x=1]", levels=("2:8",), kl=0.5, **SEARCH
            ),
            ComparedRow(method="wanda", sparsity="3/4", allocator="b", error="no"),
        ),
    ),
    "evaluation": EvalRecord(
        model=ModelRecord(source="a", fingerprint="cd"),
        reference=ModelRecord(source="b"),
        perplexity=(TextScore(source="a.txt", length=16, read=READING, value=9.0, reference=8.0, kl=0.1),),
        tasks={"arc": TaskScore(version=1.0, samples=20, metrics=(MetricScore(name="acc", value=0.5),))},
        harness=HarnessRecord(names=("arc",), batch=8, seeds={"torch": 1}),
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_record_is_read_back_as_it_was_written(name, tmp_path):
    record, path = WRITTEN[name], tmp_path / "record.json"
    record.write(path)
    assert type(record).read(path) == record
    assert json.loads(path.read_text()) == record.to_dict()
    type(record).read(path).write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_the_file_is_sorted_and_indented_and_counts_stay_whole(tmp_path):
    WRITTEN["run"].write(tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text()
    data = json.loads(text)
    assert text == json.dumps(data, indent=2, sort_keys=True) + "\n"
    assert (data["schema"], data["version"]) == ("msp_plugin/run", 2)
    assert data["search"]["curve"] == [[512, 0.6], [4096, 0.4]] and "512,\n" in text


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path):
    record = RunRecord(
        perplexity={"dense": math.inf},
        stages=(StageRecord(name="prune", perplexity=math.nan),),
        search=SearchRecord(curve=((1, math.inf),)),
    )
    record.write(tmp_path / "run.json")
    data = json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
    assert data["perplexity"] == {"dense": None} and data["stages"][0]["perplexity"] is None
    assert data["search"]["curve"] == [[1, None]]


def test_a_run_of_version_1_is_read_with_its_stages():
    data, record = json.loads(RUN_V1.read_text()), RunRecord.read(RUN_V1)
    assert data["version"] == 1 and "stages" not in data
    dense, uniform, prune = record.stages
    assert dense == StageRecord(name="dense", perplexity=data["perplexity"]["dense"])
    assert uniform == StageRecord(name="uniform", perplexity=data["perplexity"]["uniform"])
    assert prune == StageRecord(
        name="prune", perplexity=data["perplexity"]["mixed"], seconds=data["seconds"], sparsity=0.75
    )


def test_every_key_of_version_1_stays_where_it_was():
    def check(old, new, way):
        if isinstance(old, dict):
            for key in old:
                assert key in new, f"{way}.{key}"
                check(old[key], new[key], f"{way}.{key}")
        elif isinstance(old, list):
            assert len(old) == len(new)
            for i, (a, b) in enumerate(zip(old, new, strict=True)):
                check(a, b, f"{way}.{i}")
        else:
            assert old == new, way

    data = {**json.loads(RUN_V1.read_text()), "version": 2}
    check(data, RunRecord.read(RUN_V1).to_dict(), "run")


@pytest.mark.parametrize(
    ("perplexity", "stages"),
    [
        ({"dense": 2.0, "uniform": 3.0, "mixed": 3.0}, ["dense", "prune"]),  # the uniform one is the result
        ({"dense": 2.0, "uniform": None, "mixed": 3.0}, ["dense", "prune"]),
        ({"dense": 2.0, "result": 3.0}, ["dense", "prune"]),
        ({"dense": None, "uniform": None, "mixed": None}, ["prune"]),
    ],
)
def test_stages_of_version_1_are_those_that_were_measured(perplexity, stages):
    record = RunRecord.from_dict(
        {"schema": "msp_plugin/run", "version": 1, "perplexity": perplexity}, "run.json"
    )
    assert [stage.name for stage in record.stages] == stages
    assert record.stages[-1].perplexity == record.result_perplexity


def test_the_perplexity_of_the_result_is_that_of_the_last_model_even_where_it_is_not_a_number():
    stages = (StageRecord(name="prune"), StageRecord(name="recover"))
    values = {"dense": 2.0, "mixed": 4.0, "recovered": 3.0}
    assert RunRecord(stages=stages, perplexity=values).result_perplexity == 3.0
    assert RunRecord(stages=stages, perplexity=values | {"final": 5.0}).result_perplexity == 5.0
    assert RunRecord(stages=stages, perplexity=values | {"final": None}).result_perplexity is None


def test_another_recovery_replaces_the_figures_of_the_model_before_it():
    stages = (StageRecord(name="prune", perplexity=4.0), StageRecord(name="recover", perplexity=3.0, kl=0.2))
    values = {"dense": 2.0, "mixed": 4.0, "recovered": 3.0, "final": 3.5}
    record = RunRecord(stages=stages, perplexity=values, kl={"mixed": 0.5, "recovered": 0.2})
    again = with_recovery(record, Recovered(StageRecord(name="recover", perplexity=2.5)))
    assert again.perplexity == {"dense": 2.0, "mixed": 4.0, "recovered": 2.5}
    assert again.result_perplexity == 2.5 and again.kl == {"mixed": 0.5}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("version", [99, 0, "2", None, True, 1.0])
def test_a_version_that_is_not_known_is_refused(name, version, tmp_path):
    record, path = WRITTEN[name], tmp_path / "record.json"
    path.write_text(json.dumps({**record.to_dict(), "version": version}))
    with pytest.raises(RecipeError, match=r"record.json has version .*, this package reads 1") as error:
        type(record).read(path)
    assert error.value.hint == "update msp_plugin"


@pytest.mark.parametrize("name", WRITTEN)
def test_another_schema_is_refused(name):
    record = WRITTEN[name]
    with pytest.raises(RecipeError, match=rf"x is no {record.TITLE}: its schema is 'other'"):
        type(record).from_dict({**record.to_dict(), "schema": "other"}, "x")


def test_unknown_keys_are_kept_and_missing_ones_are_nothing_measured():
    data = {
        "schema": "msp_plugin/run",
        "version": 2,
        "mine": {"x": [1]},
        "search": {"loss": 0.5, "later": True},
    }
    record = RunRecord.from_dict(data, "run.json")
    found = record.to_dict()
    assert found["mine"] == {"x": [1]} and found["search"]["later"] is True
    assert record.stages == () and record.search.allocator is None and record.test is None


def test_a_value_of_another_type_is_named():
    data = {"schema": "msp_plugin/run", "version": 2, "stages": [{"name": "dense", "seconds": "long"}]}
    with pytest.raises(RecipeError, match=r"run\.json is damaged: stages\.0\.seconds: "):
        RunRecord.from_dict(data, "run.json")


def test_the_readme_is_printed_from_the_classes():
    page = (Path(msp_plugin.records.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert page == readme(), "python -m msp_plugin.records > msp_plugin/records/README.md"
    assert all(f"## {record.FILE}" in page for record in RECORDS)


def test_every_key_has_a_description():
    for record in RECORDS:
        schema = record.model_json_schema(mode="serialization")
        for part in (schema, *schema["$defs"].values()):
            assert part["description"], part
            assert all(value.get("description") for value in part["properties"].values()), part["title"]
