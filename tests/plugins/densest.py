"""A section of the report."""

from msp_plugin import Section, hookimpl


@hookimpl
def msp_report_section(record):
    if record["schema"] != "msp_plugin/run":
        return None
    units = sorted(record["allocation"]["units"], key=lambda unit: unit["zeros"] / unit["weights"])
    rows = [(unit["name"], unit["level"], f"{unit['zeros']:,}") for unit in units[:3]]
    return Section("Densest units", "What the search spared most.", ("unit", "level", "zeros"), rows)
