"""The command ``msp``."""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys

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

    with stopping() as stopped:
        from msp_plugin.cli.app import run

        run(stopped)
