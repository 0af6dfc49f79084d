"""Allocations of tiny models."""

from msp_plugin.data.samples import TextSplit, split_text
from msp_plugin.search.allocate import allocate as allocate_split

#: A search of a second.
MSP = {"name": "msp", "population": 4, "generations": 2, "offspring": 3, "tokens": 48}


def allocate(model, data, made, **options):
    """Allocate as resolved options say, after their allocator's share of the samples was split off."""
    text = TextSplit() if data is None else split_text(data, made.search_text)
    return allocate_split(model, text, made, **options)


def cache_files(tmp_path):
    """When each file of weights in the cache was written."""
    return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
