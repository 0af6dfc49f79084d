"""An exporter that writes the names of the dense form's tensors."""

from dataclasses import dataclass

from msp_plugin import Exporter, Manifest, describe_files, hookimpl


@dataclass(frozen=True)
class Listing(Exporter):
    """One name a line."""

    name = "listing"
    file: str = "tensors.txt"

    def size(self, source):
        return 100 * len(source.dense_names)

    def write(self, source, directory, progress):
        (directory / self.file).write_text("".join(f"{name}\n" for name in source.dense_names))
        return Manifest(self.name, describe_files([directory / self.file]), {})


@hookimpl
def msp_register_exporters():
    return [Listing]
