import pytest


@pytest.fixture
def nothing_left(tmp_path):
    """Check at the end that the failed export left neither its output nor a temporary directory."""
    before = {p.name for p in tmp_path.iterdir()}
    yield tmp_path / "out"
    left = {p.name for p in tmp_path.iterdir()} - before
    assert not {name for name in left if name == "out" or name.startswith(".")}
