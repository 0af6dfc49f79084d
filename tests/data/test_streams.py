"""Data sets of a hub that are read as a stream."""

import pytest

from msp_plugin.data.sources import load_texts
from msp_plugin.errors import DataError


def test_a_stream_without_declared_columns_whose_first_shard_fails_is_explained(monkeypatch, caplog):
    datasets = pytest.importorskip("datasets")
    caplog.set_level("INFO")

    def rows(fails):
        if fails:
            raise ConnectionError("401 gated")
        yield {"text": "a b"}

    for fails in (False, True):
        stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"fails": fails})
        assert stream.column_names is None
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, stream=stream, **options: stream)
        if not fails:
            assert list(load_texts("some/data")) == ["a b"]
            assert "reading some/data from the hub or its cache" in caplog.text
            continue
        with pytest.raises(DataError, match="cannot read some/data after row 0: .*401 gated"):
            load_texts("some/data")
