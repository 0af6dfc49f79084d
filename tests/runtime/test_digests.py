from msp_plugin.runtime.digests import component_digest, digest
from msp_plugin.sensitivity.fisher import FisherTrace
from msp_plugin.sensitivity.outliers import Outliers


def test_a_source_digest_tells_components_apart():
    assert component_digest(FisherTrace()) == component_digest(
        FisherTrace(samples=3)
    )  # options are not source
    assert component_digest(FisherTrace()) != component_digest(Outliers())
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1}) != digest({"a": 2, "b": 2})
