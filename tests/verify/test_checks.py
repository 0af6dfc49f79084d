"""Checks together: what is skipped, what fails, and that one does not stop the others."""

import json
from dataclasses import dataclass

import pytest

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.packed_export import Sparse24
from msp_plugin.errors import FormatError
from msp_plugin.verify.base import Check, Finding, Subject, run_checks
from msp_plugin.verify.quality import Quality
from msp_plugin.verify.round_trip import RoundTrip
from msp_plugin.verify.served import Served
from msp_plugin.verify.structure import Structure


def test_what_lacks_its_inputs_is_skipped_and_says_which_option_gives_them(packed_dir):
    results = run_checks(Subject(Checkpoint.open(packed_dir)), [Quality(), Served()])
    assert all(result.passed for result in results)
    assert [[(row.state, row.found) for row in result.findings] for result in results] == [
        [("skip", "not checked: give data (test text)")],
        [("skip", "not checked: give vllm (an environment that serves)")],
    ]


@dataclass(frozen=True)
class Raises(Check):
    name = "raises"
    bug: bool = False

    def run(self, subject, progress):
        raise ZeroDivisionError if self.bug else FormatError("this is wrong", hint="mend it")


@dataclass(frozen=True)
class Passes(Check):
    name = "passes"

    def run(self, subject, progress):
        return [Finding("all", "ok", "well", details={"n": 1})]


def test_a_check_that_fails_does_not_stop_the_others(packed_dir):
    results = run_checks(Subject(Checkpoint.open(packed_dir)), [Raises(), Passes(), Raises()])
    assert [(r.check, r.passed) for r in results] == [("raises", False), ("passes", True), ("raises", False)]
    (row,) = results[0].findings
    assert (row.item, row.state) == ("raises", "fail") and row.found == "this is wrong\n  -> mend it"
    assert results[1].to_dict() == {
        "check": "passes", "passed": True, "seconds": round(results[1].seconds, 3),
        "findings": [{"item": "all", "state": "ok", "found": "well", "expected": "", "details": {"n": 1}}],
    }  # fmt: skip


def test_a_check_that_breaks_fails_and_the_others_go_on(packed_dir):
    broken, sound = run_checks(Subject(Checkpoint.open(packed_dir)), [Raises(bug=True), Structure()])
    assert not broken.passed and "the check broke: ZeroDivisionError" in broken.findings[0].found
    assert sound.passed


def test_an_interrupt_stops_all_checks(packed_dir):
    def interrupt(step, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_checks(Subject(Checkpoint.open(packed_dir)), [Structure(), Passes()], interrupt)


def test_the_sharded_packed_form_passes_every_check_that_needs_no_server(run_dir, llama_dir, text, tmp_path):
    export_checkpoint(run_dir, Sparse24(shard_bytes=25_000), tmp_path / "out")
    subject = Subject(Checkpoint.open(tmp_path / "out"), Checkpoint.open(run_dir), str(llama_dir), text)
    results = run_checks(subject, [Structure(), RoundTrip(), Quality()])
    states = {row.item: row.state for result in results for row in result.findings}
    assert {item for item, state in states.items() if state != "ok"} == {"perplexity", "original"}
    assert all(result.passed for result in results)
    json.dumps([result.to_dict() for result in results], allow_nan=False)
