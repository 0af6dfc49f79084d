"""Groups of options that several commands share, and the recipe line that they make."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from msp_plugin.checkpoint.source import ModelSource
    from msp_plugin.data.samples import Text
    from msp_plugin.runtime.context import RunContext

Model = Annotated[str, typer.Argument(help="model directory, hub id, or demo:llama / demo:qwen2")]
Out = Annotated[Path, typer.Option("--out", "-o", help="directory for the results; must be empty or new")]
Sparsity = Annotated[str, typer.Option("--sparsity", "-s", help="share of zeros among prunable weights")]
Method = Annotated[str, typer.Option("--method", "-m", help="pruning method; see `msp plugins`")]
AllocatorName = Annotated[str, typer.Option("--allocator", help="allocator; see `msp plugins`")]
Levels = Annotated[
    str | None,
    typer.Option("--levels", help='comma list, e.g. "dense,4:8,2:8,1:8", or servable, width, depth, mixed'),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="option of allocator, method, an estimator or the recovery, e.g. allocator.tokens=8192 or fisher.samples=64",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="of every random choice")]
Baseline = Annotated[bool, typer.Option(help="also prune uniformly, to compare")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON on stdout, no bars")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="log each step, and show the hosts' logs")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="run the model repository's code")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16")]
Offload = Annotated[
    bool, typer.Option("--offload", help="leave weights on disk: for models larger than memory, slower")
]
Cache = Annotated[
    str | None,
    typer.Option("--cache", help="directory of all measurements; default $MSP_CACHE or ~/.cache/msp_plugin"),
]
Data = Annotated[
    str,
    typer.Option(
        "--data", "-d", help="calibration text: file, table (jsonl, parquet, csv, ...), directory or dataset"
    ),
]
TestData = Annotated[
    str | None, typer.Option("--test-data", help="text that measures perplexity; default: a part of --data")
]
TestCount = Annotated[
    int | None,
    typer.Option(
        "--test-samples",
        help="samples that measure perplexity; default 32, or fewer if the text is short; 0: no perplexity",
    ),
]
Count = Annotated[
    int | None,
    typer.Option("--samples", help="calibration samples; default 128, or fewer if the text is short"),
]
Length = Annotated[
    int | None,
    typer.Option(
        "--length",
        help="tokens per sample; default 2048, or the model's maximum, or less if the text is short",
    ),
]
Column = Annotated[
    str,
    typer.Option(
        "--text-column", help="column of a table or dataset with text, or a conversation's messages"
    ),
]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="start each sample with the beginning-of-text token; default: as the tokenizer does",
    ),
]


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """Options of the calibration text."""

    data: Data
    samples: Count = None
    length: Length = None
    text_column: Column = "text"
    bos: Bos = None

    def text(self, **more: Any) -> Text:
        """Return the text, with further arguments of Text."""
        from msp_plugin.data.samples import Text

        return Text(
            self.data,
            samples=self.samples,
            length=self.length,
            column=self.text_column,
            bos=self.bos,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class SearchText(CalibrationText):
    """Options of the texts for calibration and for measuring candidates."""

    search_data: Annotated[
        str | None,
        typer.Option("--search-data", help="text that measures candidates; default: a part of --data"),
    ] = None

    def text(self, **more: Any) -> Text:
        """Return the text, with further arguments of Text."""
        return super().text(search=self.search_data, **more)


@dataclass(frozen=True, kw_only=True)
class RunText(SearchText):
    """Options of the texts of a whole run, with its test text."""

    test_data: TestData = None
    test_samples: TestCount = None
    batch: Annotated[int, typer.Option("--batch", help="samples per forward pass when pruning")] = 1

    def text(self, **more: Any) -> Text:
        """Return the text, with further arguments of Text."""
        return super().text(test=self.test_data, test_samples=self.test_samples, batch=self.batch, **more)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Options for loading a model."""

    dtype: Dtype = "auto"
    trust_remote_code: Remote = False
    offload: Offload = False

    def source(self, model: str, cache: str | None = None) -> ModelSource:
        """Return the source of a model; ``cache`` is where offloaded weights that change are written."""
        from msp_plugin.checkpoint.source import ModelSource

        return ModelSource(resolve_model(model), self.dtype, self.trust_remote_code, self.offload, cache)


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """Options for the layers to prune, their levels and their bounds."""

    levels: Levels = None
    target: Annotated[list[str] | None, typer.Option("--target", help="layers to prune (repeatable)")] = None
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="layers to leave alone (repeatable)")
    ] = None
    granularity: Annotated[
        str | None,
        typer.Option(
            "--granularity",
            help="which layers share a level: layer (none), unit (those that inference fuses), half (those of an "
            "attention or MLP) or block; default: half with widths or dropped, unit if all levels run on 2:4 kernels, "
            "else layer",
        ),
    ] = None
    form: Annotated[
        str | None,
        typer.Option(
            "--form",
            help="form of msp export --to that the result is sure to allow: sparse24, bitmask, small, uniform; it chooses "
            "levels and granularity where you do not",
        ),
    ] = None
    quantum: Annotated[
        int | None,
        typer.Option("--quantum", help="a width keeps a multiple of so many channels; default: 64"),
    ] = None
    bounds: Annotated[
        list[str] | None,
        typer.Option(
            "--bounds", help="PATTERN=LOW,HIGH: least and most share of zeros of these layers (repeatable)"
        ),
    ] = None
    protect: Annotated[
        list[str] | None,
        typer.Option("--protect", help="layers to keep dense while others get sparser instead (repeatable)"),
    ] = None

    def recipe(self) -> dict[str, Any]:
        """Return the recipe keys of the options that were given.

        Raises:
            RecipeError: bounds that are not PATTERN=LOW,HIGH.
        """
        return given(
            levels=self.levels and self.levels.split(","),
            targets=self.target,
            ignore=self.ignore,
            granularity=self.granularity,
            form=self.form,
            quantum=self.quantum,
            bounds=_bounds(self.bounds),
            protect=self.protect,
        )


@dataclass(frozen=True, kw_only=True)
class Output:
    """Options for reusing the cache, and for how the command reports."""

    fresh: Annotated[bool, typer.Option("--fresh", help="ignore cached measurements and make them again")] = (
        False
    )
    as_json: AsJson = False
    verbose: Verbose = False

    @contextmanager
    def running(self) -> Iterator[RunContext]:
        """Yield the context of a run: its ranks, and progress on the terminal or in the log."""
        from msp_plugin.cli.console import progress_bars, set_up_logs
        from msp_plugin.runtime.context import RunContext
        from msp_plugin.runtime.ranks import join

        ranks = join()
        set_up_logs(self.verbose, ranks.rank)
        with progress_bars(not self.as_json and not ranks.rank) as progress:
            yield RunContext(self.fresh, progress, ranks)


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command in which each field of a dataclass parameter is an option of its own, for typer."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        group = parameter.annotation
        if not dataclasses.is_dataclass(group):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        hints = typing.get_type_hints(group, include_extras=True)
        for field in dataclasses.fields(group):
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=hints[field.name],
                )
            )

    @functools.wraps(command)
    def run(**values: Any) -> None:
        parts = {
            name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**values, **parts)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined] # inspect reads it
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are neither None nor an empty list or dictionary."""
    return {key: value for key, value in values.items() if value not in (None, [], {})}


def resolve_model(model: str) -> str:
    """Return the directory of a demo model for ``demo:NAME``, and any other model with ``~`` expanded."""
    from msp_plugin.demo import demo_model_path
    from msp_plugin.runtime.files import expanded

    if model.startswith("~"):  # a shell leaves it as it is in --original=~/model
        return str(expanded(model))
    return str(demo_model_path(model[5:])) if model.startswith("demo:") else model


def component_options(
    pairs: list[str] | None, estimators: Collection[str] = (), /, **names: str
) -> dict[str, Any]:
    """Return components by role, with the options of ``--set role.option=value`` merged in.

    Args:
        estimators: names of estimators, which are roles too.
        names: the component's name by role.

    Raises:
        RecipeError: a pair is not of this form, or its role is unknown.
    """
    from msp_plugin.errors import RecipeError, nearest, shown
    from msp_plugin.runtime.documents import parse_yaml

    specs: dict[str, dict[str, Any]] = {role: {"name": name} for role, name in names.items()}
    for pair in pairs or ():
        left, equals, text = pair.partition("=")
        role, dot, option = left.partition(".")
        if not (equals and dot and option):
            raise RecipeError(f"--set {shown(pair)} is not ROLE.OPTION=VALUE")
        if role not in {*specs, *estimators}:
            raise RecipeError(
                f"--set {shown(pair)}: no such role {shown(role)}", hint=nearest(role, {*specs, *estimators})
            )
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise RecipeError(f"--set {left}: {shown(text)} is not a value: {error}") from None
        specs.setdefault(role, {})[option] = value
    return specs


def recipe_line(method: str, allocator: str, pairs: list[str] | None, **keys: Any) -> dict[str, Any]:
    """Return a recipe line: the method and the allocator with the options of ``--set``, and further ``keys``.

    Raises:
        RecipeError: see component_options.
    """
    from msp_plugin.plugins.manager import Plugins

    known = Plugins().components["estimators"]
    specs = component_options(pairs, known, method=method, allocator=allocator)
    method_spec, allocator_spec = specs.pop("method"), specs.pop("allocator")
    return given(method=method_spec, allocator=allocator_spec, estimators=specs, **keys)


def recovery_spec(
    name: str | None, pairs: list[str] | None
) -> tuple[dict[str, Any] | None, list[str] | None]:
    """Return (a recovery with the options of ``--set NAME.option=value``, the other pairs).

    Args:
        name: None for no recovery.

    Raises:
        RecipeError: see component_options.
    """
    if name is None:
        return None, pairs
    own = [pair for pair in pairs or () if pair.startswith(f"{name}.")]
    return component_options(own, **{name: name})[name], [pair for pair in pairs or () if pair not in own]


def _bounds(pairs: list[str] | None) -> dict[str, list[str]]:
    """Return [least, most] share of zeros by pattern.

    Raises:
        RecipeError: a text that is not PATTERN=LOW,HIGH.
    """
    from msp_plugin.errors import RecipeError

    shares: dict[str, list[str]] = {}
    for text in pairs or ():
        pattern, equals, values = text.rpartition("=")
        pair = [part.strip() for part in values.split(",")]
        if not (equals and pattern and len(pair) == 2):
            raise RecipeError(f"--bounds {text!r} is not PATTERN=LOW,HIGH", hint="e.g. down_proj=0.5,0.75")
        shares[pattern] = pair
    return shares
