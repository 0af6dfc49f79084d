"""`msp enable` and `msp disable`: make the modifier available to unchanged llm-compressor scripts."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from msp_plugin.errors import OutputError
from msp_plugin.runtime.files import write_text

# Python runs each line of a .pth file that begins with import. This line must not fail after an uninstall.
_LINE = r"""import sys; exec("try:\n import msp_plugin._autoload\nexcept ImportError: pass")""" + "\n"


def hook_file() -> Path:
    """Return the path of the start-up file in this environment's site-packages."""
    return Path(sysconfig.get_paths()["purelib"]) / "msp_plugin_autoload.pth"


def is_enabled() -> bool:
    """Return True if the start-up file is there."""
    return hook_file().is_file()


def enable() -> Path:
    """Write the start-up file and return its path.

    Raises:
        OutputError: site-packages cannot be written.
    """
    path = hook_file()
    try:
        write_text(path, _LINE)
        path.chmod(0o644)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error}", hint="use a virtual environment that you may write to"
        ) from error
    return path


def disable() -> Path:
    """Remove the start-up file, if it is there, and return its path.

    Raises:
        OutputError: it cannot be removed.
    """
    path = hook_file()
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {path}: {error}") from error
    return path
