import subprocess
import sys

import pytest

from msp_plugin.errors import OutputError
from msp_plugin.runtime.locks import locked

HOLDER = """
import sys, time
from pathlib import Path
from msp_plugin.runtime.locks import locked
with locked(Path(sys.argv[1]), "it counts"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def start(path, seconds):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, path, str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_lock_refuses_a_second_process_and_is_free_when_the_first_is_killed(tmp_path):
    path = tmp_path / "new" / "lock"
    with start(path, 60) as process:
        with (
            pytest.raises(OutputError, match="another process holds .*: it counts"),
            locked(path, "it counts"),
        ):
            pass
        process.kill()
    with locked(path, "it counts"):
        pass


def test_a_lock_can_be_waited_for(tmp_path):
    with start(tmp_path / "lock", 0.5) as process, locked(tmp_path / "lock", "it counts", wait=True):
        assert process.wait(5) == 0


def test_a_lock_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot lock") as error, locked(tmp_path / "file" / "lock", "x"):
        pass
    assert "MSP_CACHE" in error.value.hint
