"""A check that looks at every tensor."""

from dataclasses import dataclass

from msp_plugin import hookimpl
from msp_plugin.verify.base import FAIL, OK, Check, Finding


@dataclass(frozen=True)
class NoNaN(Check):
    """No tensor holds NaN."""

    name = "no_nan"
    most: int = 0

    def run(self, subject, progress):
        counts = {name: int(tensor.isnan().sum()) for name, tensor in subject.checkpoint.dense_tensors()}
        bad = [
            Finding(name, FAIL, f"{n} NaN", f"at most {self.most}")
            for name, n in counts.items()
            if n > self.most
        ]
        return bad or [Finding("tensors", OK, f"{len(counts)} without NaN")]


@hookimpl
def msp_register_checks():
    return [NoNaN]
