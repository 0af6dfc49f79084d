"""The command ``msp``."""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
from typing import NoReturn

# Packages read these variables when they are imported, so they are set before any import.
_QUIET = {
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def main() -> None:
    """Run the command line; exit 0, the error's code, 130 after Ctrl-C or 143 after SIGTERM."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not {"-v", "--verbose"} & set(sys.argv):
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks must not end a run.
            stream.reconfigure(errors="backslashreplace")
    # Otherwise Python searches all imported objects for garbage when it ends, which takes seconds.
    atexit.register(gc.freeze)
    from msp_plugin.cli.stopping import stopping

    is_rank = (os.environ.get("WORLD_SIZE") or "1") != "1"
    try:
        with stopping() as stopped:
            from msp_plugin.cli.app import run

            run(stopped)
    except SystemExit as ended:
        if is_rank and not ended.code:
            _end_rank()
        raise


def _end_rank() -> NoReturn:
    """End this process with exit code 0, without what C++ destroys at the end.

    There threads of torch.distributed may abort a rank whose work is done, and torchrun then stops the one that still
    writes the result.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
