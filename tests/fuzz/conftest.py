import pytest

from tests.fuzz.readers import fill


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory for all examples of a module: each writes its file anew."""
    return tmp_path_factory.mktemp("read")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, run_dir, packed_dir, packed_any_dir):
    """A copy of a dense checkpoint, and of one in each packed format."""
    return {
        "dense": fill(tmp_path_factory.mktemp("read") / "dense", run_dir),
        "packed": fill(tmp_path_factory.mktemp("read") / "packed", packed_dir),
        "bitmask": fill(tmp_path_factory.mktemp("read") / "bitmask", packed_any_dir),
    }
