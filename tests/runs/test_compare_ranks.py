"""Comparisons by several ranks."""

import copy

import pytest

from msp_plugin.models.load import load_model
from msp_plugin.runtime.ranks import LostError
from tests.helpers.comparing import SEARCH, Raises, allocators_plugin, by_name


def without_times(record):
    kept = {key: value for key, value in record.items() if key != "machine"}
    timeless = [{k: v for k, v in row.items() if "seconds" not in k} for row in record["rows"]]
    return {**kept, "rows": timeless}


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_ranks_find_the_rows_of_one_process_and_the_first_of_them_has_the_record(
    run, on_ranks, llama_dir, monkeypatch, tmp_path, with_plugins, size
):
    with_plugins(mine=allocators_plugin(Raises))
    bug = {"name": "raises", "how": "bug"}
    allocators = {"ours": "raises", "bug": bug, "small": SEARCH, **by_name("owl", "uniform")}
    expected = run(allocators, methods=("wanda",), cache=str(tmp_path / "alone"))
    loaded = load_model(llama_dir, "float32")
    monkeypatch.setattr("msp_plugin.checkpoint.source.load", lambda *a, **b: copy.deepcopy(loaded))
    met = []

    def work(ranks):
        monkeypatch.setattr(ranks, "leave", lambda: met.append(ranks.meetings))
        return run(allocators, methods=("wanda",), cache=str(tmp_path / "shared"), ranks=ranks)

    first, *others = on_ranks(size, work)
    assert without_times(first) == without_times(expected) and others == [None] * (size - 1)
    assert met == met[:1] * size and met[0] > 10, "they met for every measurement, and as often"
    assert first["machine"].endswith(f", {size} ranks")
    assert [row["error"] is None for row in first["rows"]] == [False, False, True, True, True]


def test_what_fails_on_the_first_rank_alone_is_a_row_and_the_ranks_go_on_together(
    run, on_ranks, llama_dir, monkeypatch, tmp_path
):
    loaded = load_model(llama_dir, "float32")
    monkeypatch.setattr("msp_plugin.checkpoint.source.load", lambda *a, **b: copy.deepcopy(loaded))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "sensitivity").write_text("in the way of the journals that rank 0 writes")
    allocators = {"small": SEARCH, **by_name("owl", "uniform"), "again": {**SEARCH, "rounds": 1}}

    def work(ranks):
        monkeypatch.setattr(ranks, "leave", lambda: None)
        return run(allocators, ranks=ranks)

    first, other = on_ranks(2, work)
    assert other is None
    errors = {row["allocator"]: row["error"] for row in first["rows"]}
    assert "sensitivity" in errors["owl"] and errors["uniform"] is None
    assert without_times(run(allocators)) == without_times(first)


def test_several_ranks_build_a_database_anew_if_asked_whatever_the_allocators_need(
    run, on_ranks, llama_dir, monkeypatch, tmp_path
):
    loaded = load_model(llama_dir, "float32")
    monkeypatch.setattr("msp_plugin.checkpoint.source.load", lambda *a, **b: copy.deepcopy(loaded))

    def written():
        found = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("cache/**/*.safetensors")}
        assert found
        return found

    def work(ranks):
        monkeypatch.setattr(ranks, "leave", lambda: None)
        return run(by_name("uniform"), methods=("wanda",), ranks=ranks, fresh=True)

    run(by_name("uniform"), methods=("wanda",))
    before = written()
    assert on_ranks(2, work)[1] is None
    assert before.keys() == written().keys() and all(before[name] < at for name, at in written().items())


def test_a_rank_that_ends_ends_the_comparison(run, on_ranks, llama_dir, monkeypatch):
    loaded = load_model(llama_dir, "float32")
    monkeypatch.setattr("msp_plugin.checkpoint.source.load", lambda *a, **b: copy.deepcopy(loaded))

    def work(ranks):
        def lost(*a):
            raise LostError("rank 0 lost the others")

        monkeypatch.setattr(ranks, "map", lost)
        return run({"small": SEARCH}, ranks=ranks)

    assert all(isinstance(error, LostError) for error in on_ranks(2, work))
