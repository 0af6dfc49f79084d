import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory for all examples of a module: each writes its file anew."""
    return tmp_path_factory.mktemp("read")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, run_dir, packed_dir, packed_any_dir):
    """A copy of a dense checkpoint, and of one in each packed format."""
    from readers import fill

    return {
        "dense": fill(tmp_path_factory.mktemp("read") / "dense", run_dir),
        "packed": fill(tmp_path_factory.mktemp("read") / "packed", packed_dir),
        "bitmask": fill(tmp_path_factory.mktemp("read") / "bitmask", packed_any_dir),
    }
