"""What the command line prints: progress where there is no terminal, and text that is never markup."""

import io
import json
import logging
import sys

import pytest
from rich.table import Table

from msp_plugin.cli import console
from msp_plugin.errors import OutputError
from msp_plugin.progress import ProgressLines, Repeated, no_progress, prefixed
from msp_plugin.records.run import RunRecord, SparsityRecord, StageRecord

#: Each would be lost, coloured or replaced if it were markup or an emoji code.
ODD = "out[1] [red]x[/red] [/] :smile:"


@pytest.fixture
def lines():
    """ProgressLines with a clock that ``at(seconds)`` sets, and what they printed."""

    class Lines:
        now = 0.0

        def __init__(self):
            self.printed = []
            self.report = ProgressLines(self.printed.append, lambda: self.now)

        def at(self, seconds, *report):
            self.now = seconds
            self.report(*report)
            return self.printed[-1] if self.printed else None

    return Lines()


def test_a_step_prints_a_line_every_half_minute_and_one_when_it_is_done(lines):
    for second in range(1, 61):
        lines.at(second, "level database", second, 60)
    assert lines.printed == [
        "level database: 30 of 60, 50 %, about 0:30 left",
        "level database: 60 of 60 done in 1:00",
    ]


def test_a_step_begins_with_the_last_report_of_the_one_before_it(lines):
    assert lines.at(10, "perplexity, dense", 8, 8) == "perplexity, dense: 8 of 8 done in 0:10"
    assert lines.at(130, "pruning", 1, 3) == "pruning: 1 of 3, 33 %"  # one report gives no pace
    assert lines.at(250, "pruning", 2, 3) == "pruning: 2 of 3, 66 %, about 2:00 left"
    assert lines.at(3740, "pruning", 3, 3) == "pruning: 3 of 3 done in 1:02:10"
    assert lines.at(3741, "pruning", 1, 1) == "pruning: 1 of 1 done in 0:01"  # a second step of that name


def test_what_a_stopped_run_had_done_counts_for_no_pace(lines):
    lines.at(1, "search", 80, 100)
    assert lines.at(41, "search", 90, 100) == "search: 90 of 100, 90 %, about 0:40 left"


def test_two_steps_at_once_have_a_line_each(lines):
    for second in range(0, 70, 10):
        lines.at(second, "a", second, 100)
        lines.at(second, "b", second, 100)
    assert [line[:2] for line in lines.printed] == ["a:", "b:", "a:", "b:"]


def test_a_note_is_printed_with_its_step(lines):
    assert (
        lines.at(31, "search", 3, 30, "round 3, loss 0.2163") == "search: 3 of 30, 10 %; round 3, loss 0.2163"
    )
    assert lines.at(40, "search", 30, 30, "loss 0.2") == "search: 30 of 30 done in 0:40; loss 0.2"
    report = prefixed("uniform, ", lines.report)
    report("search", 1, 1, "note")
    report("search", 1, 1)
    no_progress("search", 1, 1, "note")
    assert lines.printed[-2:] == [
        "uniform, search: 1 of 1 done in 0:00; note",
        "uniform, search: 1 of 1 done in 0:00",
    ]


@pytest.mark.parametrize("verbose", [False, True])
def test_without_a_terminal_a_log_line_stays_whole(capsys, verbose):
    message = f"/a/{'long/' * 40}path {ODD}"
    console.set_up_logs(verbose)
    logging.getLogger("msp_plugin").warning(message)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"WARNING: {message}") and verbose == line[0].isdigit()


def test_without_a_terminal_progress_goes_to_stderr_as_it_is(capsys):
    with console.progress_bars() as report:
        report(ODD, 2, 2, ODD)
    with console.progress_bars(show=False) as report:
        report(ODD, 2, 2)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == f"{ODD}: 2 of 2 done in 0:00; {ODD}\n"


def test_a_bar_shows_step_and_note_as_they_are(monkeypatch, capsys):
    terminal = console.Console(
        stderr=True, force_terminal=True, width=200, highlight=False, markup=False, emoji=False
    )
    monkeypatch.setattr(console, "err", terminal)
    with console.progress_bars() as report:
        report(ODD, 1, 2, "first")
        report(ODD, 2, 2, "loss [0.2]")
    shown = capsys.readouterr().err
    assert ODD in shown and "2/2" in shown and "loss [0.2]" in shown


def test_each_model_of_a_run_is_shown_with_its_own_zeros():
    shares = {"dense": None, "uniform": 0.5, "prune": 0.25, "recover": 0.75}
    record = RunRecord(
        stages=tuple(StageRecord(name=name, sparsity=share) for name, share in shares.items()),
        sparsity=SparsityRecord(achieved=0.25),
        perplexity={"dense": 2.0, "uniform": 3.0, "mixed": 2.5, "recovered": 2.2},
    )
    zeros = list(console.quality_table(record, "").columns[1].cells)
    assert zeros == ["-", "50.00 %", "25.00 %", "75.00 %"]


def test_no_text_is_read_as_markup(capsys):
    table = Table(title=ODD)
    table.add_column(ODD)
    table.add_row(ODD)
    for place in (console.out, console.table, console.err):
        place.print(ODD)
        place.print(table)
    console.table.print(console.quality_table(RunRecord(perplexity={"dense": 2.0}), ODD))
    console.set_up_logs(verbose=False)
    logging.getLogger("msp_plugin").warning(ODD)
    captured = capsys.readouterr()
    assert captured.out.count(ODD) == 9 and captured.err.count(ODD) == 5


@pytest.mark.parametrize("command", ["prune", "allocate", "compare", "export", "verify"])
def test_paths_with_brackets_are_printed_as_they_are(command, msp, run_dir, llama_dir, tmp_path, copied):
    name, text = "[1] [red]", tmp_path / "[1] text.txt"
    text.write_text("while True:\n    x = x + 1\n" * 300)
    out = tmp_path / name
    given = [llama_dir, "--data", text, "--samples", "4", "--length", "32", "--out", out]
    plain = ["-s", "0.75", "-m", "magnitude"]
    arguments = {
        "prune": [*given, *plain, "--allocator", "uniform", "--test-samples", "0"],
        "allocate": [*given, *plain, "--allocator", "uniform"],
        "compare": [*given, *plain, "--allocators", "uniform", "--no-prune", "--test-samples", "2"],
        "export": [run_dir, "--to", "sparse24", "--out", out],
        "verify": [copied(run_dir, name) if command == "verify" else None, "--check", "structure"],
    }[command]
    assert name in " ".join(msp(command, *arguments).out.split())  # a title is folded


@pytest.mark.parametrize("as_json", [False, True])
def test_a_record_that_cannot_be_written_is_printed_first(tmp_path, capsys, as_json):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        console.deliver(
            RunRecord(perplexity={"dense": 2.5}),
            tmp_path / "file" / "out.json",
            as_json,
            lambda record: print("2.5"),
        )
    assert "2.5" in capsys.readouterr().out


def test_doctor_shows_what_it_found_as_it_is(msp, monkeypatch):
    from msp_plugin.cli import doctor

    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check(ODD, "fail", ODD, ODD)])
    shown = msp("doctor", code=1).out
    assert shown == f"FAIL {ODD}: {ODD}\n     -> {ODD}\n" and json.loads(msp("doctor", "--json", code=1).out)


def test_a_name_that_the_terminals_encoding_lacks_is_printed_with_escapes(msp, copied, run_dir, monkeypatch):
    path, terminal = copied(run_dir, "modèle"), io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert "Traceback" not in msp("verify", path, "--check", "structure").err
    terminal.flush()
    assert b"mod\\xe8le" in terminal.buffer.getvalue()


def test_a_world_size_that_is_no_number_is_one_clear_error(msp, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "all")
    assert msp("doctor", code=1).err.startswith("error: WORLD_SIZE is 'all', expected a number of ranks")


def test_a_long_part_of_a_step_repeats_the_last_report(lines):
    report = Repeated(lambda *at: lines.report("search", *at))
    report.again()
    for second in range(0, 130, 10):
        lines.at(second, "other", second, 1000)
        if second == 10:
            report(1, 30, "round 1, loss 0.5")
        report.again()
    report(30, 30)
    report.again()
    assert [line[:20] for line in lines.printed if "search" in line] == [
        "search: 1 of 30, 3 %",
        "search: 1 of 30, 3 %",
        "search: 1 of 30, 3 %",
        "search: 30 of 30 don",
    ]
