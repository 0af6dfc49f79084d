"""What the tests of packed formats share."""

import pytest
from safetensors.torch import save_file

from msp_plugin.formats.base import TensorInfo


@pytest.fixture
def headers(tmp_path):
    """Write the tensors of the packed layer ``m.up``, given by suffix; return their headers by suffix."""

    def write(tensors):
        file = tmp_path / "x.safetensors"
        file.unlink(missing_ok=True)
        save_file({f"m.up.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}, file)
        return {s: TensorInfo(file, t.dtype, tuple(t.shape)) for s, t in tensors.items()}

    return write
