"""Documents and bytes that were damaged: what stands in a file that nobody, or somebody else, wrote."""

import copy
import json

from hypothesis import strategies as st

#: Values that readers stumble over: other types, large sizes, words that mean something elsewhere.
ODD = [
    None, True, False, 0, 1, -1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 0.5, 1.0, -0.0, 5e-324,
    float("nan"), float("inf"), float("-inf"), "", " ", "0", "dense", "2:4", "4:2", "1:999999999999", "0.5", "1/0",
    "nan", "\x00", "\u00b2", "\u0665", "../x", "/", "model.layers.\u00b2.x", "NFC\u0301",
    "{{x}}", "</script>", [], {}, [[]], {"": None}, [0, -1], "x" * 3000,
]  # fmt: skip


def deep(levels):
    value = []
    for i in range(levels):
        value = [value] if i % 2 else {"a": value}
    return value


values = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
) | st.sampled_from([deep(60), deep(90)])


def paths(value, at=()):
    """Yield the way to every value inside of a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from paths(inner, (*at, key))


def _edit(draw, document):
    """Replace, delete, insert, copy or swap something in a document, in place; return it."""
    ways = list(paths(document))
    if not ways:
        return copy.deepcopy(draw(values))
    way = draw(st.sampled_from(ways))
    at = document
    for key in way[:-1]:
        at = at[key]
    action = draw(st.sampled_from(["replace", "replace", "odd", "delete", "insert", "copy", "wrap", "text"]))
    if action == "replace":
        at[way[-1]] = copy.deepcopy(draw(values))
    elif action == "odd":
        at[way[-1]] = copy.deepcopy(draw(st.sampled_from(ODD)))
    elif action == "delete":
        del at[way[-1]]
    elif action == "insert" and isinstance(at, dict):
        at[draw(st.text(max_size=4) | st.sampled_from(["schema", "name", ""]))] = copy.deepcopy(draw(values))
    elif action == "insert":
        at.insert(way[-1], copy.deepcopy(draw(values)))
    elif action == "copy":
        other = document
        for key in draw(st.sampled_from(ways)):
            other = other[key]
        at[way[-1]] = copy.deepcopy(other)
    elif action == "wrap":
        at[way[-1]] = [at[way[-1]]]
    else:
        at[way[-1]] = str(at[way[-1]])[:100]
    return document


@st.composite
def documents(draw, valid):
    """A valid document after one to three edits."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        document = _edit(draw, document)
    return document


@st.composite
def json_files(draw, valid):
    """The bytes of a valid JSON document after edits of its values or of its bytes."""
    if draw(st.booleans()):
        document = draw(documents(valid))
        try:
            return json.dumps(document, indent=draw(st.sampled_from([None, 1]))).encode()
        except (ValueError, RecursionError):  # more digits than Python writes: hexadecimal is no JSON either
            return b'{"a": 0x' + b"f" * 5000 + b"}"
    return draw(byte_files(json.dumps(valid, indent=1).encode()))


@st.composite
def byte_files(draw, valid):
    """Bytes of a file that were cut, flipped, repeated, nested or written in another encoding."""
    action = draw(
        st.sampled_from(["cut", "flip", "insert", "repeat", "bom", "utf-16", "nest", "own", "lines"])
    )
    at = draw(st.integers(0, len(valid)))
    end = draw(st.integers(at, min(len(valid), at + 80)))
    if action == "cut":
        return valid[:at] + valid[end:]
    if action == "flip":
        return valid[:at] + bytes([draw(st.integers(0, 255))]) + valid[at + 1 :]
    if action == "insert":
        return (
            valid[:at] + draw(st.binary(max_size=12) | st.sampled_from([b"\0", b"\xff", b"NaN"])) + valid[at:]
        )
    if action == "repeat":
        return valid[:end] + valid[at:]
    if action == "bom":
        return b"\xef\xbb\xbf" + valid
    if action == "utf-16":
        return valid.decode("latin-1").encode("utf-16")
    if action == "nest":
        return valid[:at] + b"[" * draw(st.sampled_from([3, 100, 100_000])) + valid[at:]
    if action == "lines":  # a line twice is a key twice in most formats
        lines = valid.split(b"\n")
        line = draw(st.integers(0, len(lines) - 1))
        return b"\n".join([*lines[: line + 1], *lines[line:]])
    return draw(st.binary(max_size=64))
