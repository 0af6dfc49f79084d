"""Build and load the operator of ``operator.cpp``; a library in the cache serves later processes."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import torch
from torch import library as operators

from msp_plugin.errors import OutputError
from msp_plugin.runtime.digests import digest
from msp_plugin.runtime.files import cache_directory, replacing
from msp_plugin.runtime.locks import locked

log = logging.getLogger(__name__)

_SOURCES = ("operator.cpp", "expand.h", "expand_x86.h", "expand_rows.h", "expand_amx.h")
#: The flags that torch's own builder (torch/utils/cpp_extension.py) gives g++ and clang, and OpenMP, with which
#: ``at::parallel_for`` uses torch's threads. Its load() is not used: it asks for ninja and includes all of Python.
#: Without vectors of neighbouring scalars: GCC 12 makes them of the rows' addresses, which costs time.
_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-tree-slp-vectorize",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
)
#: Seconds after which a compiler counts as failed. g++ 12 took 25 s of CPU time, and a quarter of an hour beside
#: fifteen other processes on two cores.
_TIMEOUT = 3600
_LOADING = threading.Lock()


def load_operator() -> str | None:
    """Load ``msp_plugin::bitmask_linear``, built first if the cache lacks it; return why not, None if it is there.

    Asked again in one process, it answers as before. Threads and processes that build at once wait for the first of them.
    """
    with _LOADING:
        return _load_operator()


@functools.cache
def _load_operator() -> str | None:
    """See load_operator; in one thread at a time."""
    try:
        library = build_library()
        _load(library)
    except _BuildError as error:
        return str(error)
    except OutputError as error:
        return f"the kernels cannot be stored: {error.message}"
    except (OSError, RuntimeError) as error:
        return f"the built kernels cannot be loaded: {str(error).splitlines()[0]}"
    return None


@functools.cache
def _load(library: Path) -> None:
    """Load the built library, once in a process."""
    torch.ops.load_library(str(library))
    operators.impl("msp_plugin::bitmask_linear", "Meta", _output)  # what torch.compile traces


class _BuildError(Exception):
    """The kernels cannot be built here; the message says why."""


def _output(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    kernel: str,
) -> torch.Tensor:
    """Return a tensor [..., O] of the product's shape and dtype, for tensors without data."""
    return x.new_empty((*x.shape[:-1], row_offsets.numel()))


def is_built() -> bool | str:
    """Return whether the cache holds the library for this machine and torch; the reason if it cannot be built."""
    try:
        return _is_whole(_plan()[1])
    except _BuildError as error:
        return str(error)


def build_library() -> Path:
    """Return the library in the cache, built if it is not there, or not as it was built."""
    command, library = _plan()
    if not _is_whole(library):
        with locked(library.with_suffix(".lock"), "it builds the CPU kernels", wait=True):
            if not _is_whole(library):  # another process may have built it meanwhile
                _build(command, library)
    return library


def _is_whole(library: Path) -> bool:
    """Return True if a library has the digest that was written beside it: loading a damaged one may kill the process."""
    try:
        return _digest_file(library).read_text(encoding="utf-8") == _sha256(library)
    except (OSError, UnicodeDecodeError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _plan() -> tuple[list[str], Path]:
    """Return the compiler's command, and the library's place, named by all that it depends on."""
    if sys.platform not in ("linux", "darwin"):
        raise _BuildError(f"the kernels are not built on {sys.platform}")
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise _BuildError(f"CXX is no command: {error}") from error
    version = _run([*compiler, "--version"]).splitlines()[0]
    folder, torch_folder = Path(__file__).parent, Path(torch.__file__).parent
    flags = [*_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command = [
        *compiler,
        *flags,
        f"-isystem{torch_folder / 'include'}",
        f"-isystem{torch_folder / 'include/torch/csrc/api/include'}",
        f"-L{torch_folder / 'lib'}",
        str(folder / _SOURCES[0]),
        "-ltorch_cpu",
        "-lc10",
    ]
    sources = [(folder / name).read_text(encoding="utf-8") for name in _SOURCES]
    # Without the folders, so that environments with the same torch share a library.
    key = digest([sources, compiler, flags, version, torch.__version__, platform.machine(), sys.platform])
    return command, cache_directory(None) / "kernels" / f"{key[:32]}.so"


def _build(command: list[str], library: Path) -> None:
    """Compile the library to its place; it appears there whole."""
    log.warning("building the CPU kernels, once for this machine and torch (%s)", library)
    try:
        with replacing(library) as temporary:
            _run([*command, "-o", str(temporary)])
        with replacing(_digest_file(library)) as temporary:
            temporary.write_text(_sha256(library), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write {library}: {error.strerror}",
            hint="set MSP_CACHE to a directory that you may write to",
        ) from error


def _run(command: list[str]) -> str:
    """Return what a compiler prints."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT, check=False
        )
    except OSError as error:
        raise _BuildError(
            f"no C++ compiler: {command[0]}: {error.strerror} (set CXX, or install g++)"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise _BuildError(f"the compiler {command[0]} did not end within {_TIMEOUT} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise _BuildError(f"the compiler {command[0]} failed: {reason.strip()}")
    return done.stdout or "unknown"
