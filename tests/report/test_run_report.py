"""The report of one run: what is in it, and that nothing gets into it from outside."""

import base64
import os
import re
import subprocess
import sys

import pytest

from msp_plugin.errors import PluginError, RecipeError
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.units import Layer, Unit, UnitTable
from msp_plugin.plugins.manager import Plugins
from msp_plugin.report import Section, write_report
from msp_plugin.report.palette import PAGE, SERIES

HOSTILE = """</title><script>alert(1)</script><img src=x onerror="alert(2)">' & $x_1$ {{ 7 * 7 }}"""


def outside(page):
    """Everything in a page that would be fetched or run."""
    found = [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed", "base", "form")]
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            value = value or ""
            inside = tag == "img" and value.startswith("data:image/svg+xml;base64,")
            fetched = name in ("src", "srcset", "action", "data", "poster") or name.startswith("on")
            fetched = fetched and not inside
            away = "href" in name and not value.startswith(("#", "data:,"))
            if fetched or away or re.search(r"url\((?!#)|@import", value):
                found.append((tag, name, value))
    return found


def test_nothing_is_fetched_or_run_and_the_page_forbids_it(records, compared, report):
    for found in (report(records()), compared):
        assert outside(found) == []
        style = found.text[: found.text.index("msp report")]
        assert "url(" not in style and "@import" not in style and "--ink" in style
        (policy,) = [
            m["content"] for m in found.of("meta") if m.get("http-equiv") == "Content-Security-Policy"
        ]
        assert policy.startswith("default-src 'none'")


def test_text_from_outside_stays_text(records, report, table):
    layers = tuple(Layer(f'a"b<i>{i}', 32, 32) for i in range(2))
    units = UnitTable(
        tuple(Unit(f'layers.{i}.x"><script>{i}', i, (layer,)) for i, layer in enumerate(layers))
    )
    search = {"allocator": HOSTILE, "loss": 0.4, "uniform_loss": 0.5, "curve": [[1, 0.5]], "notes": [HOSTILE]}
    speed = [{"name": HOSTILE, "value": 1.0, "unit": HOSTILE, "source": HOSTILE}]
    path = records(
        units=units, search=search, speed=speed, model={"source": HOSTILE, "dtype": "bfloat16"},
        versions={HOSTILE: HOSTILE}, perplexity={HOSTILE: 3.0}, command=HOSTILE,
    )  # fmt: skip
    found = report(path)
    assert outside(found) == []
    assert found.row(HOSTILE)[0] == HOSTILE and found.row("Model") == ["Model", HOSTILE]
    assert any('x"><script>1' in c.get("title", "") for c in found.of("td"))


def test_the_level_of_every_unit_is_in_the_map(records, report):
    path = records(levels=("dense", "7:8", "2:4", "3:8", "1:8"))
    expected = {
        unit.name: level.name
        for allocation in [Allocation.read(path / "allocation.json")]
        for unit, level in zip(allocation.table, allocation.levels, strict=True)
    }
    titles = [cell["title"].split(": ", 1) for cell in report(path).of("td") if "title" in cell]
    found = {name: text.split(",")[0] for name, text in titles if "kernels" in text}
    assert found == expected and len(expected) == 16


def test_the_map_has_a_row_for_each_block_and_marks_what_2_4_kernels_run(records, report):
    found = report(records(levels=("2:8", "3:8", "1:8", "dense")))
    assert ["#", "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "zeros"] in found.rows
    assert [row[:5] for row in found.rows].count(["3", "2:8", "3:8", "1:8", "dense"]) == 1
    marked = [" k" in f" {c.get('class', '')} " for c in found.of("td") if "kernels" in c.get("title", "")]
    assert marked == [True, False, True, False] * 4


def test_levels_of_every_kind_are_counted_in_whole_weights(records, report):
    path = records(levels=("3:8 in 2:4", "0.7", "2:8", "dense"))
    found, allocation = report(path), Allocation.read(path / "allocation.json")
    assert found.row("0")[1:5] == ["3:8 in 2:4", "7/10", "2:8", "dense"]
    assert found.row("zeros")[-1] == f"{100 * float(allocation.budget.sparsity):.1f} %"
    assert found.row("7/10")[1:3] == ["70 %", "4"] and found.row("7/10")[-1] == "no"
    assert found.row("3:8 in 2:4")[-1] == "yes •"


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_other_granularities_have_a_map_too(granularity, records, report, table):
    layers = [(unit.block, layer) for unit in table(3) for layer in unit.layers]
    if granularity == "layer":
        units = UnitTable(tuple(Unit(layer.name, block, (layer,)) for block, layer in layers))
        heads, row = (
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            ["2:4"] * 7,
        )
    else:
        units = UnitTable(
            tuple(Unit(f"model.layers.{i}", i, tuple(a for b, a in layers if b == i)) for i in range(3))
        )
        heads, row = ["block"], ["2:4"]
    found = report(records(units=units, levels=("2:4",)))
    assert ["#", *heads, "zeros"] in found.rows
    assert [r for r in found.rows if r[1:-1] == row] == [[str(i), *row, "50.0 %"] for i in range(3)]


def test_sensitivity_stands_beside_the_map_on_a_logarithmic_scale(records, report):
    found = report(records())
    cells = [c for c in found.of("td") if "per weight" in c.get("title", "")]
    assert [c["class"] for c in cells] == [f"v{round(8 * i / 15)}" for i in range(16)]
    assert "1.0e−2" in found.text and "logarithmic" in found.text


def test_head_search_quality_and_provenance_say_what_the_records_say(records, report):
    found = report(records())
    assert "Mixed sparsity takes back 57 % of the loss that uniform sparsity adds" in found.text
    assert found.row("mixed") == ["mixed", "15.626", "+0.194", "0.4100"]
    assert found.row("dense") == ["dense", "12.872", "–", "–"]
    for text in (
        "704,512",
        "constant scores in block 2",
        "12 proposals of the search",
        "98,304 zeros recounted",
    ):
        assert text in found.text, text
    assert found.row("Seed") == ["Seed", "0"] and found.row("torch") == ["torch", "2.13.0"]
    assert len(found.of("img")) == 2 and all(image["alt"] for image in found.of("img"))
    assert found.row("hold-out text, incumbents")[1:] == ["40,960", "0.47"]


def test_charts_have_the_colours_of_the_page_which_the_dark_theme_inverts_and_no_id_is_shared(
    records, compared, report
):
    for found in (report(records()), compared):
        drawn = [base64.b64decode(i["src"].partition(",")[2]).decode() for i in found.of("img")]
        assert drawn and all(PAGE["light"][name] in svg for svg in drawn for name in ("ink", "muted", "rule"))
        assert any(SERIES["light"][0] in svg for svg in drawn)
        assert not re.search(r"https?://(?!www\.w3\.org/)", "".join(drawn))
        style = found.text[: found.text.index("msp report")]
        assert (
            "(prefers-color-scheme: dark) { figure img { filter: invert(1) hue-rotate(180deg); } }" in style
        )
        ids = [a["id"] for _, a in found.tags if "id" in a]
        assert len(set(ids)) == len(ids)
        targets = [a["href"][1:] for _, a in found.tags if a.get("href", "").startswith("#")]
        targets += re.findall(
            r"url\(#([^)]+)\)", " ".join(v or "" for _, a in found.tags for v in a.values())
        )
        assert set(targets) <= set(ids)
        styles = " ".join(a["style"] for _, a in found.tags if "style" in a)
        assert "var(--c0)" in styles  # the legends' marks


def test_speed_is_shown_where_measured_and_else_how_to_measure_it(records, report):
    found = report(records())
    assert "Not measured; python integration/gpu/sparse24_gpu.py" in found.text
    row = {"name": "decode, batch 1", "value": 41.25, "unit": "tokens/s", "source": "results.json"}
    found = report(records("measured", speed=[row]))
    assert found.row("decode, batch 1") == ["decode, batch 1", "41.25", "tokens/s", "results.json"]
    assert "Not measured;" not in found.text


def test_what_is_missing_null_or_infinite_is_said_and_breaks_nothing(records, report):
    nothing = dict.fromkeys(
        ("model", "sparsity", "perplexity", "kl", "search", "versions", "python", "seed", "seconds")
    )
    found = report(records("bare", sensitivities=False, **nothing))
    for text in (
        "No sensitivity was measured", "No search is recorded", "No predictions are recorded", "Not measured.",
        "bfloat16, assumed because", "Sparsity, achieved not recorded",
    ):  # fmt: skip
        assert text in found.text, text
    search = {"allocator": "msp", "loss": None, "curve": [[4096, float("inf")], [None, 0.5], [8192, 0.4]]}
    quality = {"dense": 12.0, "uniform": float("inf"), "mixed": None}
    found = report(records("odd", search=search, perplexity=quality, kl=None))
    assert found.row("uniform") == ["uniform", "∞", "+∞"]
    assert "takes back" not in found.text and len(found.of("img")) == 1


def test_an_allocation_alone_has_a_report(records, report):
    path = records()
    (path / "run.json").unlink()
    found = report(path / "allocation.json")
    assert "not pruned yet" in found.text and len(found.of("td")) > 16
    with pytest.raises(RecipeError, match="for the allocation alone give"):
        report(path)


@pytest.mark.slow
def test_equal_records_give_equal_bytes_in_any_place_and_process(records, comparison_dir, copied):
    code = """if True:
        import sys
        from msp_plugin.plugins.manager import Plugins
        from msp_plugin.report import write_report
        for path in sys.argv[1:]:
            write_report(path, plugins=Plugins(entry_points=False))
    """
    sources = records(), comparison_dir(methods=["m"], sparsities=["3/4"], seeds=1)
    moved = [copied(source, f"moved_{source.name}") for source in sources]
    for source in sources:
        write_report(source, plugins=Plugins(entry_points=False))
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, *moved], check=True, env=environment)
    for source, copy in zip(sources, moved, strict=True):
        assert (source / "report.html").read_bytes() == (copy / "report.html").read_bytes()


def test_a_plugins_section_comes_after_ours_and_only_its_html_is_taken_as_it_is(
    records, report, sample_plugin
):
    class Trusted:
        pass

    trusted = Trusted()
    trusted.msp_report_section = sample_plugin("densest").hookimpl(
        lambda: Section(
            "A <b>first</b>", f"One.\n\n{HOSTILE}", ("x",), [(HOSTILE,)], "<p class='mine'>5 &gt; 3</p>"
        )
    )
    both = Plugins(extra={"densest": sample_plugin("densest"), "trusted": trusted}, entry_points=False)
    found = report(records(levels=("2:8", "dense")), both)
    assert found.row("model.layers.0.self_attn.o_proj") == ["model.layers.0.self_attn.o_proj", "dense", "0"]
    assert outside(found) == [] and found.row(HOSTILE) == [HOSTILE] and {"class": "mine"} in found.of("p")
    order = [found.text.rindex(t) for t in ("Commands,", "A <b>first</b>", "What the search spared most.")]
    assert order == sorted(order)


@pytest.mark.parametrize("answer", [{"title": "no", "html": ""}, ZeroDivisionError("never")])
def test_a_section_that_fails_names_its_plugin(answer, records, report, sample_plugin):
    class Broken:
        pass

    def section(record):
        record.clear()  # its own copy
        if isinstance(answer, Exception):
            raise answer
        return answer

    broken = Broken()
    broken.msp_report_section = sample_plugin("densest").hookimpl(section)
    with pytest.raises(
        PluginError, match=r"plugin broken: msp_report_section\(\) (returned dict|raised Zero)"
    ):
        report(records(), Plugins(extra={"broken": broken}, entry_points=False))


@pytest.mark.parametrize(("method", "again"), [("sparsegpt", True), ("wanda", True), ("l2", False)])
def test_commands_name_the_method_and_no_recipe_that_llm_compressor_refuses(
    method, again, records, report, edit_json
):
    run = records()
    (run / "recipe.yaml").write_text("sparsity_stage: {}")
    edit_json(run / "allocation.json", lambda data: data["provenance"]["method"].update(name=method))
    text = report(run).text
    by = "" if method == "sparsegpt" else f"-m {method} "
    assert f"{by}--allocation allocation.json" in text and ("msp run recipe.yaml" in text) == again


@pytest.mark.parametrize("source", ["org/llama", "gpt2", "/models/llama", "demo:llama"])
def test_commands_name_a_model_that_is_found_from_everywhere(source, records, report):
    assert f"msp prune {source} --allocation" in report(records(model={"source": source})).text


def test_the_uniform_allocation_takes_nothing_back_from_itself(records, report):
    text = report(records(perplexity={"dense": 12.0, "uniform": 15.0, "mixed": 15.0})).text
    assert "takes back" not in text and "Test perplexity 15.000, 12.000 before pruning" in text
