import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from msp_plugin.data.samples import Text
from msp_plugin.errors import OutputError
from msp_plugin.runs import prune as pipeline
from msp_plugin.runs.prune import prune
from msp_plugin.runtime.context import RunContext
from msp_plugin.runtime.locks import scratch_directory, sole_output, sole_run
from tests.helpers.clock import make_losses_slow


class StopError(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture
def run(llama_dir, tmp_path, monkeypatch):
    """Run a recipe; ``stop`` ends it at the first report of that step."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog sat on the log\n" * 200)
    search = {"name": "search", "tokens": 64, "holdout": 32, "rounds": 1, "seeds": 2}
    line = {"sparsity": "1/2", "levels": ["dense", "2:4", "1:4"], "allocator": search, "method": "wanda"}
    monkeypatch.setenv("MSP_CACHE", str(tmp_path / "cache"))

    def run(out="out", stop=None, fresh=False, **options):
        steps = []

        def progress(step, done, total, note=""):
            steps.append(step)
            if stop == step:
                raise StopError(step)

        text_of = Text(str(text), None, None, 12, 24, 2)
        result = None
        with suppress(StopError):
            context = RunContext(fresh, progress)
            result = prune(llama_dir, text_of, tmp_path / out, context=context, **line, **options)
        assert (result is None) == bool(stop)
        return set(steps)

    run.text = text
    return run


def files(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != "run.json"}


def test_a_stopped_run_goes_on_with_what_it_had_measured_and_ends_with_the_same_bytes(run, tmp_path):
    run("undisturbed", fresh=True)
    assert "perplexity, dense" in run(stop="pruning", fresh=True)
    assert not (tmp_path / "out").exists()
    steps = run()
    assert not steps & {
        "perplexity, dense", "perplexity, uniform", "uniform, pruning", "level database", "Fisher-weighted error",
    }  # fmt: skip
    assert {"search", "pruning", "perplexity, mixed"} <= steps
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    mixed = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("out", "undisturbed")]
    assert mixed[0]["perplexity"] == mixed[1]["perplexity"]
    assert mixed[0]["search"]["curve"] == mixed[1]["search"]["curve"]
    assert not list((tmp_path / "cache/runs").glob("*.jsonl"))


def test_the_seconds_of_a_run_that_went_on_hold_the_search_before_the_stop(run, tmp_path, monkeypatch):
    late = make_losses_slow(monkeypatch)
    run(stop="pruning")
    run()
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["seconds"] > record["search"]["seconds"] >= late[0] > 0


def test_fresh_measures_everything_anew(run):
    everything = run("one")
    assert "level database" in everything and "level database" not in run(stop="pruning")
    assert run(fresh=True) == everything


@pytest.mark.slow
def test_text_that_changed_in_between_is_named_and_nothing_of_the_old_is_taken(run, tmp_path, caplog):
    run(stop="pruning")
    run.text.write_text("another text altogether, with other words in it\n" * 200)
    caplog.clear()
    steps = run()
    assert "belongs to another calibration, test: it is kept for that, and this starts again" in caplog.text
    assert {"perplexity, dense", "perplexity, uniform", "level database", "sensitivity, fisher"} <= steps
    run("undisturbed", fresh=True)
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_a_directory_that_another_run_writes_to_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_split", None)
    with (
        sole_run(tmp_path / "out", None),
        pytest.raises(OutputError, match="another process holds .*it writes to .*out"),
    ):
        run()


@pytest.mark.parametrize("inside", [False, True])
def test_what_a_killed_run_left_half_written_is_removed_and_nothing_else(tmp_path, inside):
    out = tmp_path / "out"
    folder = out if inside else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / f".out.{'0a' * 16}.partial").mkdir()
    others = [tmp_path / ".out.partial", tmp_path / f".out2.{'0a' * 16}.partial"]
    for other in others:
        other.mkdir()
    with sole_run(out, str(tmp_path / "cache")) as (path, journal):
        assert path == out and not list(folder.glob(".out.0*.partial"))
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.write_text("x")
    assert (
        not journal.exists()
        and not list(tmp_path.glob(".out.*.lock"))
        and all(other.exists() for other in others)
    )


def test_the_journal_of_a_run_that_fails_stays(tmp_path):
    with suppress(StopError), sole_run(tmp_path / "out", str(tmp_path / "cache")) as (_, journal):
        journal.parent.mkdir(parents=True)
        journal.write_text("x")
        raise StopError
    assert journal.exists()
    with sole_run(tmp_path / "out", str(tmp_path / "cache"), fresh=True):
        assert not journal.exists()


def test_runs_with_other_caches_keep_off_each_others_directory(tmp_path):
    refused = pytest.raises(OutputError, match="another process holds")
    with (
        sole_run(tmp_path / "out", str(tmp_path / "a")),
        refused,
        sole_run(tmp_path / "out", str(tmp_path / "b")),
    ):
        pass


HOLDER = """
import sys
from msp_plugin.runtime.locks import scratch_directory
with scratch_directory("offload", sys.argv[1]) as folder:
    (folder / "weights").write_text("of a model")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_scratch_directory_stays_while_its_process_lives_and_what_a_killed_one_left_goes(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    theirs = Path(process.stdout.readline().strip())
    with (
        scratch_directory("offload", str(tmp_path)) as mine,
        scratch_directory("offload", str(tmp_path)) as more,
    ):
        assert (theirs / "weights").is_file() and len({theirs, mine, more}) == 3
        assert {theirs.parent, mine.parent} == {tmp_path / "offload"}
    assert not mine.exists() and not more.exists() and theirs.exists()
    process.kill()
    process.communicate()
    assert theirs.exists()
    with scratch_directory("offload", str(tmp_path)) as mine:
        assert not theirs.exists() and mine.is_dir()
    assert list((tmp_path / "offload").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "offload").write_text("a file")
    with pytest.raises(OutputError, match="offload"), scratch_directory("offload", str(tmp_path)):
        pass


def test_a_run_into_directories_that_another_one_makes_meanwhile_is_refused(tmp_path):
    refused = pytest.raises(OutputError, match="another process holds")
    out = tmp_path / "runs" / "a"
    with sole_run(out, str(tmp_path / "cache")):
        (tmp_path / "runs").mkdir(exist_ok=True)
        with refused, sole_run(out, str(tmp_path / "cache")):
            pass
    assert not (tmp_path / "runs").exists()  # nothing was written to it


def test_an_output_below_a_file_is_refused_for_what_it_is(tmp_path):
    (tmp_path / "afile").write_text("mine")
    for file in (False, True):
        with (
            pytest.raises(OutputError, match="afile"),
            sole_output(tmp_path / "afile" / "run", str(tmp_path), file=file),
        ):
            pass
    assert (tmp_path / "afile").read_text() == "mine"


def test_a_file_is_kept_to_one_writer_and_what_a_killed_one_left_goes(tmp_path):
    out = tmp_path / "new" / "allocation.json"
    with sole_output(out, file=True) as path:
        left = path.parent / f".{path.name}.{'0a' * 16}.partial"
        left.write_text("half")
        with pytest.raises(OutputError, match="another process holds"), sole_output(out, file=True):
            pass
    with sole_output(out, file=True) as path:
        assert not left.exists()
        path.write_text("whole")
    with pytest.raises(OutputError, match="exists"), sole_output(out, file=True):
        pass
    assert [p.name for p in out.parent.iterdir()] == ["allocation.json"]


STARTER = """
import sys
from msp_plugin.runtime.locks import scratch_directory
for _ in range(40):
    with scratch_directory("offload", sys.argv[1]) as folder:
        assert folder.is_dir()
"""


def test_processes_that_start_together_have_scratch_directories_of_their_own(tmp_path):
    started = [
        subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 3, said
    assert list((tmp_path / "offload").iterdir()) == []


def test_a_cache_in_the_users_home_is_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with sole_run(tmp_path / "out", "~/mine") as (_, journal):
        assert journal.is_relative_to(tmp_path / "mine")
