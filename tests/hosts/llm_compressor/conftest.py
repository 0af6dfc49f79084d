import pytest

from msp_plugin.data.sources import load_texts
from msp_plugin.data.tokenize import tokenize
from msp_plugin.demo import demo_model_path
from msp_plugin.models.load import load_model
from msp_plugin.models.source import load_tokenizer


@pytest.fixture(scope="session")
def demo_calibration():
    tokenizer = load_tokenizer(demo_model_path("qwen2"))
    texts = load_texts("demo:calibration")
    return tokenize(tokenizer, texts, samples=8, length=64, source="demo:calibration")


@pytest.fixture(scope="session")
def calibration(demo_calibration):
    return demo_calibration


@pytest.fixture
def demo_model():
    return load_model(demo_model_path("qwen2"), "float32")
