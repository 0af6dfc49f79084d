"""Building the CPU kernels: once, whole, and dense products where that fails."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from msp_plugin.serving.cpu import build
from msp_plugin.serving.cpu.kernel import choose

reason = build.load_operator()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"no CPU kernels: {reason}")


@pytest.fixture
def built_anew():
    """Let this test's process ask for the library again. Name it before monkeypatch, whose changes must end first."""
    build._load_operator.cache_clear()
    yield
    build._load_operator.cache_clear()
    assert build.load_operator() is None


@pytest.mark.parametrize(("compiler", "message"), [
    ("no-such-compiler", "no C\\+\\+ compiler: no-such-compiler"), ("false", "the compiler false failed"),
    ('"', "CXX is no command"),
])  # fmt: skip
def test_without_a_compiler_that_works_weights_are_served_dense(built_anew, compiler, message, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    choice = choose(torch.bfloat16)
    assert choice.kernel == "dense" and re.search(message, choice.reason)


def test_a_source_that_does_not_compile_is_dense_and_says_the_compilers_error(
    built_anew, monkeypatch, tmp_path
):
    monkeypatch.setenv("MSP_CACHE", str(tmp_path))
    script = tmp_path / "cxx"
    script.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo mine && exit\necho 'operator.cpp:1: error: no such type' >&2\n"
        "printf 'in Latin-1: \\351' >&2\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert build.load_operator() == f"the compiler {script} failed: operator.cpp:1: error: no such type"
    assert not list(tmp_path.glob("kernels/*.so"))


def test_a_cache_that_cannot_be_written_is_dense(built_anew, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MSP_CACHE", str(tmp_path / "file"))
    assert "the kernels cannot be stored" in choose(torch.bfloat16).reason


def test_threads_that_ask_at_once_load_the_library_once(built_anew, monkeypatch):
    build._load.cache_clear()
    loading, most = [], []

    def load(library):
        loading.append(library)
        most.append(len(loading))
        time.sleep(0.05)
        loading.pop()

    monkeypatch.setattr(build, "_load", load)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: build.load_operator(), range(4))) == [None] * 4
    assert most == [1]


def test_builders_at_once_share_one_library(monkeypatch, tmp_path):
    """A compiler that takes a while and copies a finished library stands in, as the real one takes a minute."""
    real = build.build_library()
    script = tmp_path / "cxx"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo mine && exit\necho x >> {tmp_path}/calls\nsleep 0.5\n'
        f'for last; do :; done\ncp {real} "$last"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("MSP_CACHE", str(tmp_path / "cache"))
    with ThreadPoolExecutor(2) as pool:
        paths = {future.result() for future in [pool.submit(build.build_library) for _ in range(2)]}
    assert (tmp_path / "calls").read_text() == "x\n"
    assert paths == set((tmp_path / "cache" / "kernels").glob("*.so")) and len(paths) == 1


@pytest.mark.parametrize("share", [0.0005, 0.5])
def test_a_damaged_library_in_the_cache_is_built_anew(share, monkeypatch, tmp_path):
    script, real = tmp_path / "cxx", build.build_library()
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo mine && exit\nfor last; do :; done\ncp {real} "$last"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("MSP_CACHE", str(tmp_path / "cache"))
    library = build.build_library()
    library.write_bytes(library.read_bytes()[: int(share * library.stat().st_size)])
    code = "from msp_plugin.serving.cpu.build import load_operator; print(load_operator())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stdout == "None\n" and "building the CPU kernels" in done.stderr
    assert library.read_bytes() == real.read_bytes()
