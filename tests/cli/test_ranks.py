"""What several ranks do not share is refused."""

import sys

import pytest

from msp_plugin.cli import app
from msp_plugin.data.samples import Text
from msp_plugin.errors import RecipeError
from msp_plugin.runs.prune import run_recipe
from msp_plugin.runtime.context import RunContext
from msp_plugin.runtime.ranks import Ranks


@pytest.mark.parametrize("command", ["verify", "export", "sensitivity", "eval"])
def test_commands_that_do_not_share_refuse_several_ranks(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["msp", command, "x"])
    with pytest.raises(SystemExit) as end:
        app.run()
    said = capsys.readouterr().err
    assert (
        end.value.code
        and f"rank 1: error: {command} runs in one process, not in 2" in said
        and "torchrun" in said
    )


def test_a_recipe_that_is_not_ours_alone_is_refused_by_several_ranks(llama_dir, tmp_path, make_samples):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 100)

    class Two(Ranks):
        size = 2

    modifiers = {"MixedSparsityModifier": {"sparsity": 0.5}, "WandaPruningModifier": {"sparsity": 0.5}}
    recipe = {"a_stage": {"b_modifiers": modifiers}}
    with pytest.raises(
        RecipeError, match="2 ranks share a search, and this recipe has none, or has other modifiers"
    ):
        run_recipe(
            recipe,
            llama_dir,
            Text(str(text), None, None, 8, 24, 0),
            tmp_path / "out",
            context=RunContext(ranks=Two()),
        )
