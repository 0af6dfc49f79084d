import pytest

from msp_plugin.data.calibration import CalibrationSet
from tests.helpers.losses import magnitude_levels


@pytest.fixture
def measured(tmp_path):
    """A magnitude database for any model, and a problem at one half."""
    return lambda model: magnitude_levels(model, tmp_path / "cache")


@pytest.fixture
def mixed(make_samples):
    """Samples of two lengths."""
    return CalibrationSet(make_samples(3, 9).samples + make_samples(4, 20, seed=1).samples, "mixed")
