"""A check that looks at every tensor."""

from dataclasses import dataclass

from msp_plugin import Check, Finding, hookimpl


@dataclass(frozen=True)
class NoNaN(Check):
    """No tensor holds NaN."""

    name = "no_nan"
    most: int = 0

    def run(self, subject, progress):
        counts = {name: int(tensor.isnan().sum()) for name, tensor in subject.checkpoint.dense_tensors()}
        bad = [
            Finding(name, "fail", f"{n} NaN", f"at most {self.most}")
            for name, n in counts.items()
            if n > self.most
        ]
        return bad or [Finding("tensors", "ok", f"{len(counts)} without NaN")]


@hookimpl
def msp_register_checks():
    return [NoNaN]
