"""The embedded models and the command that prunes one."""

from pathlib import Path

import pytest

import msp_plugin
from msp_plugin.demo import DEMO_MODELS, demo_model_path
from msp_plugin.errors import ModelError


def test_the_demo_prunes_the_model_with_more_to_take_back_unless_another_is_named(msp):
    shown = " ".join(msp("demo", "--help").out.split())
    assert "[default: qwen2]" in shown and "qwen2 or llama" in shown
    assert demo_model_path() == demo_model_path(DEMO_MODELS[0]) == demo_model_path("qwen2")


def test_a_model_that_is_not_embedded_is_refused_before_anything_is_written(msp, tmp_path):
    assert (
        "there is no demo model 'lama'"
        in msp("demo", "--model", "lama", "--out", tmp_path / "out", code=2).err
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="no demo model"):
        demo_model_path("../llama")


def test_the_demo_takes_fifteen_megabytes_at_most():
    demo = Path(msp_plugin.__file__).parent / "demo"
    files = [p for p in demo.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert sum(p.stat().st_size for p in files) < 15e6
