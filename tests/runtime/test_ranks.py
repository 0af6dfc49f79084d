"""Ranks as threads, and as processes that torchrun starts."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch

from msp_plugin.errors import NumericsError
from msp_plugin.runtime.ranks import ALONE, join


def test_values_come_in_the_order_of_the_items_whatever_the_ranks(on_ranks):
    for size in (1, 2, 3, 5, 9):
        found = on_ranks(size, lambda ranks: ranks.map(lambda i: i * i, range(7)))
        assert found == [[0, 1, 4, 9, 16, 25, 36]] * size
        done = on_ranks(size, lambda ranks: ranks.share(list(range(7))))
        assert (
            sorted(itertools.chain(*done)) == list(range(7))
            and max(map(len, done)) - min(map(len, done)) <= 1
        )
        assert on_ranks(size, lambda ranks: ranks.on_rank_zero(lambda: ranks.rank + 5)) == [5] * size


def test_an_error_of_one_rank_is_raised_on_all(on_ranks):
    def work(ranks):
        def fail():
            if ranks.rank == 1:
                raise NumericsError("rank one", hint="as it is")

        ranks.gather(fail)

    said = [str(error) for error in on_ranks(3, work)]
    assert said == [f"{where}rank one\n  -> as it is" for where in ("rank 1: ", "", "rank 1: ")]


def test_a_value_that_cannot_be_sent_is_an_error_on_all(on_ranks):
    def work(ranks):
        with pytest.raises(Exception, match="pickle"):
            ranks.gather(lambda: threading.Lock() if ranks.rank == 1 else ranks.rank)
        return ranks.gather(lambda: ranks.rank)

    assert on_ranks(3, work) == [[0, 1, 2]] * 3


def test_sums_are_those_of_all_ranks(on_ranks):
    found = on_ranks(3, lambda ranks: ranks.all_reduce_sum(torch.full((2,), ranks.rank + 1)).tolist())
    assert found == [[6, 6]] * 3 and ALONE.all_reduce_sum(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize("error", [NumericsError("rank one"), ZeroDivisionError("rank one"), None])
@pytest.mark.parametrize("where", ["before", "between", "in", "after"])
def test_works_that_fail_on_one_rank_alone_leave_the_ranks_in_step(on_ranks, error, where):
    """As a lock or a journal does, which the first rank alone holds."""

    def work(ranks):
        def part(number, place):
            if error and number == 1 and place == where and ranks.rank == 1:
                raise error
            return number, place, ranks.rank

        seen, ends = [], []
        for number in range(3):

            def measure(number=number):
                part(number, "before")
                seen.append(ranks.gather(lambda: part(number, "in")))
                part(number, "between")
                seen.append(ranks.gather(lambda: (number, "second", ranks.rank)))
                assert ranks.all_reduce_sum(torch.tensor(number)) == 3 * number
                part(number, "after")

            try:
                ranks.collective(measure)
                ends.append("done")
            except Exception as found:
                ends.append(str(found).split("\n")[0].rpartition(": ")[2])
        return ends, seen, ranks.meetings

    found = on_ranks(3, work)
    assert [ends for ends, _, _ in found] == [["done", "rank one" if error else "done", "done"]] * 3
    assert len({meetings for *_, meetings in found}) == 1
    for _, seen, _ in found:
        assert all([value[:2] for value in values] == [values[0][:2]] * 3 for values in seen)
        assert seen[-1] == [(2, "second", rank) for rank in range(3)]


def test_one_process_is_alone():
    assert join({}) is ALONE and join({"WORLD_SIZE": "1"}) is ALONE
    assert join({"WORLD_SIZE": ""}) is ALONE
    assert ALONE.gather(lambda: 3) == [3] and ALONE.on_rank_zero(lambda: 4) == 4 and ALONE.leave() is None


PROCESS = """
import atexit, os, signal, sys
import torch
import torch.distributed as dist
from msp_plugin.errors import MSPError, NumericsError
from msp_plugin.runtime.ranks import join

def end():  # after what join has registered
    if dist.is_initialized():
        print("a group of its own")
        dist.destroy_process_group()

atexit.register(end)
ranks = join()

def fails(error):
    if ranks.rank == 1:
        raise error

try:
    assert ranks.map(lambda i: i * i, range(5)) == [0, 1, 4, 9, 16]
    assert ranks.on_rank_zero(lambda: ranks.rank) == 0
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        total = ranks.all_reduce_sum(torch.full((3, 2), ranks.rank + 1, dtype=dtype).T)
        assert torch.equal(total, torch.full((2, 3), 3, dtype=dtype))
    for number, error in enumerate((NumericsError("no number"), KeyError("no number"))):
        try:
            ranks.collective(lambda: (ranks.gather(os.getpid), fails(error), ranks.all_reduce_sum(torch.ones(1))))
        except (MSPError, KeyError) as found:
            where = f"rank 1: {'KeyError: ' if number else ''}" if ranks.rank == 0 else ""
            assert str(found).startswith(f"{where}{error}"), found
        else:
            raise AssertionError("no error")
    if sys.argv[1] == "end" and ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "error":
        ranks.gather(lambda: fails(NumericsError("no number")))
    pids = ranks.gather(os.getpid)
    ranks.leave()
    if ranks.rank == 0:
        print(len(set(pids)), "ranks", "WORLD_SIZE" in os.environ)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # as a host may
except MSPError as error:
    sys.stdout.write(f"{str(error).splitlines()[0]}\\n")
    sys.exit(3)
"""


def run_two(how):
    """Return (exit code, stdout, stderr) of the process on each of two ranks, started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, how], env={**os.environ, **about, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    return [(*process.communicate(timeout=120), process.returncode) for process in processes]


@pytest.mark.slow
def test_processes_share_add_up_fail_together_and_part():
    (said, errors, code), (other, other_errors, other_code) = run_two("share")
    assert (said, code, other, other_code) == ("2 ranks False\na group of its own\n", 0, "", 0), (
        errors + other_errors
    )


@pytest.mark.slow
def test_processes_end_with_the_error_of_one():
    assert [(said, code) for said, _, code in run_two("error")] == [
        ("rank 1: no number\n", 3), ("no number\n", 3)
    ]  # fmt: skip


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others():
    (said, _, code), (_, _, killed) = run_two("end")
    assert said.startswith("rank 0 stops, because another rank has ended (")
    assert (code, killed) == (3, -signal.SIGKILL)


@pytest.mark.slow
def test_torchrun_starts_ranks(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script, "share"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout == "2 ranks False\na group of its own\n", run.stderr[-2000:]
