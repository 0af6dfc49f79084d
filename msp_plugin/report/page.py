"""Render one HTML page with the report's own sections and those of plugins."""

from __future__ import annotations

import copy
from importlib.resources import files
from typing import Any

from msp_plugin import __version__
from msp_plugin.errors import PluginError
from msp_plugin.plugins.manager import Plugins
from msp_plugin.report import text
from msp_plugin.report.charts import missing, number_of
from msp_plugin.report.comparison_page import comparison_page
from msp_plugin.report.palette import css
from msp_plugin.report.run_page import run_page
from msp_plugin.report.section import Section
from msp_plugin.report.source import Compared, Run

_FILTERS = {
    name: getattr(text, name)
    for name in ("number", "signed", "short", "count", "percent", "rounded_percent", "seconds", "mebibytes")
}


def render(source: Run | Compared, plugins: Plugins | None = None) -> str:
    """Return the page of a run or of a comparison.

    Raises:
        PluginError: jinja2 or matplotlib is missing, or a plugin's section failed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise missing("jinja2") from None
    environment = Environment(
        loader=PackageLoader("msp_plugin.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(_FILTERS, number_of=number_of)
    if isinstance(source, Run):
        name, page = "run.html", run_page(source)
        record = source.record.to_dict() | {"allocation": source.allocation.to_dict()}
    else:
        name, page, record = "comparison.html", comparison_page(source.record), source.record.to_dict()
    style = (files("msp_plugin.report") / "templates" / "style.css").read_text(encoding="utf-8")
    return environment.get_template(name).render(
        **page,
        style=css() + style,
        version=__version__,
        sections=plugin_sections(record, plugins or Plugins()),
    )


def plugin_sections(record: dict[str, Any], plugins: Plugins) -> list[Section]:
    """Return the sections of all plugins, sorted by title.

    Each plugin gets its own copy of the record, so that no plugin sees another's changes.

    Raises:
        PluginError: a plugin raised, or returned something that is not a Section.
    """
    sections = []
    for implementation in plugins.hook.msp_report_section.get_hookimpls():
        owner = plugins.owners[id(implementation.plugin)]
        arguments = {"record": copy.deepcopy(record)} if implementation.argnames else {}
        try:
            section = implementation.function(**arguments)
        except Exception as error:
            raise PluginError(
                f"plugin {owner}: msp_report_section() raised {type(error).__name__}: {error}",
                hint="repair or uninstall it, or block it with MSP_BLOCK_PLUGINS=NAME",
            ) from error
        if section is None:
            continue
        if not isinstance(section, Section):
            raise PluginError(
                f"plugin {owner}: msp_report_section() returned {type(section).__name__}",
                hint="return a msp_plugin.report.Section, or None",
            )
        sections.append((section.title, owner, section))
    return [section for _, _, section in sorted(sections, key=lambda item: item[:2])]
