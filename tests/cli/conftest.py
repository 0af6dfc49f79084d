import pytest


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"def function_{i}(a, b):\n    return a * {i} + b\n" for i in range(800)))
    return path
