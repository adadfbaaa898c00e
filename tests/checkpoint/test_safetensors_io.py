"""safetensors: shards, dtypes, and files that are damaged or lie."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_jax.checkpoint import safetensors_io
from atom_jax.checkpoint.safetensors_io import SafetensorsSource, write_tensors
from atom_jax.typing import AtomError

FUZZ = settings(max_examples=150, deadline=None, derandomize=True, database=None)
ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "c.weight": np.linspace(-1, 1, 5).astype(np.float16),
    "d.scalar": np.array(7, np.int64),
    "e.empty": np.zeros((0, 4), np.float32),
}


def build(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def read_all(path):
    source = SafetensorsSource(path)
    return {name: source.read(name) for name in source.infos}


@pytest.mark.parametrize("shard_bytes", [10**9, 50, 1])
def test_round_trip(in_memory, tmp_path, shard_bytes):
    write_tensors(tmp_path, in_memory(ARRAYS), shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes == 10**9)
    found = read_all(tmp_path)
    assert found.keys() == ARRAYS.keys()
    for name, x in ARRAYS.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape
        assert found[name].tobytes() == x.tobytes()
    if shard_bytes == 50:
        index = json.loads((tmp_path / safetensors_io.INDEX).read_text())
        assert index["weight_map"].keys() == ARRAYS.keys()
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in ARRAYS.values())


def test_transposed_arrays_are_written_in_their_own_order(in_memory, tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_tensors(tmp_path, in_memory({"x": x}))
    np.testing.assert_array_equal(read_all(tmp_path)["x"], x)


ENTRY = json.dumps(entry()).encode()
BAD = {
    "empty file": (b"", "not a whole safetensors file"),
    "only a length": (b"\x10\0\0\0\0\0\0\0", "not a whole safetensors file"),
    "oversized header": (build({}, length=2**62), "header does not fit"),
    "no JSON": (build(b"{{{{"), "not valid JSON"),
    "nested JSON": (build(b"[" * 50_000), "not valid JSON"),
    "header is a list": (build([1]), "not a table"),
    "listed twice": (build(b'{"a":%s,"a":%s}' % (ENTRY, ENTRY), b"x" * 8), "'a' is listed twice"),
    "beyond the end": (build({"a": entry(offsets=(0, 8))}, b"1234"), "'a' lies beyond the end"),
    "shape too large": (build({"a": entry(shape=(3,))}, b"x" * 8), "'a' of shape .* does not fill its 8 bytes"),
    "shape overflows": (build({"a": entry(shape=(2**40, 2**40))}, b"x" * 8), "'a' of shape .* does not fill"),
    "negative size": (build({"a": entry(shape=(-2,))}, b"x" * 8), "'a' has no proper"),
    "no dtype": (build({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"x" * 8), "'a' has no proper"),
    "dtype is a list": (build({"a": entry(dtype=["F32"])}, b"x" * 8), "'a' has no proper"),
    "float8": (build({"a": entry("F8_E4M3", (8,))}, b"x" * 8), "'a' has dtype F8_E4M3, which is not supported"),
    "overlap": (build({"a": entry(), "b": entry()}, b"x" * 8), "not a valid safetensors file"),
    "gap": (build({"a": entry(shape=(1,), offsets=(4, 8))}, b"x" * 8), "not a valid safetensors file"),
    "bytes left over": (build({"a": entry()}, b"x" * 9), "not a valid safetensors file"),
    "NaN": (build({"a": entry()}, struct.pack("<ff", 1, float("nan"))), "'a' holds NaN or infinite"),
    "infinity": (build({"a": entry("F16", (4,))}, b"\0\0\0\0\0\x7c\0\0"), "'a' holds NaN or infinite"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_sentence(tmp_path, case):
    data, message = BAD[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(AtomError, match=message) as e:
        read_all(tmp_path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


@pytest.fixture(scope="module")
def good_file(in_memory, tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    write_tensors(path, in_memory(ARRAYS))
    return (path / "model.safetensors").read_bytes()


@FUZZ
@given(data=st.data())
def test_damaged_files_never_do_more_than_raise(good_file, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    raw = bytearray(good_file)
    header = struct.unpack("<Q", raw[:8])[0]
    kind = data.draw(st.sampled_from(["truncate", "length", "flip", "digits", "extend"]))
    if kind == "truncate":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    elif kind == "length":
        raw[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * len(raw))))
    elif kind == "flip":
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, 8 + header - 1))] = data.draw(st.integers(0, 255))
    elif kind == "digits":
        places = [i for i in range(8, 8 + header) if chr(raw[i]).isdigit()]
        for i in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=6)):
            raw[i] = data.draw(st.sampled_from(b"0123456789-e."))
    else:
        raw += data.draw(st.binary(min_size=1, max_size=20))
    path.write_bytes(raw)
    try:
        found = read_all(path)
    except AtomError:
        return
    assert sum(x.nbytes for x in found.values()) <= len(raw)


def test_missing_shards_are_named(in_memory, tmp_path):
    write_tensors(tmp_path, in_memory(ARRAYS), 50)
    gone = sorted(tmp_path.glob("model-*"))[0]
    gone.unlink()
    with pytest.raises(AtomError, match=f"1 of 2 weight files are missing: {gone.name}"):
        SafetensorsSource(tmp_path)


def test_a_tensor_in_two_shards_is_refused(in_memory, tmp_path):
    write_tensors(tmp_path, in_memory(ARRAYS), 50)
    first, second = sorted(tmp_path.glob("model-*"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(AtomError, match=r"tensor 'a\.weight' is also in model-00001"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}', '{"x": 1}'])
def test_a_bad_index_is_one_sentence(tmp_path, index):
    (tmp_path / safetensors_io.INDEX).write_text(index)
    with pytest.raises(AtomError, match=r"index\.json"):
        SafetensorsSource(tmp_path)


def test_an_index_cannot_point_outside(tmp_path):
    (tmp_path / safetensors_io.INDEX).write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(AtomError, match="not a plain file name"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(AtomError, match=rf"{name}: pickled weights are never.*weights_only=True.*save_file"):
            SafetensorsSource(path)


def test_a_file_that_shrinks_after_opening_is_noticed(in_memory, tmp_path):
    write_tensors(tmp_path, in_memory(ARRAYS))
    source = SafetensorsSource(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(AtomError, match="it has changed since"):
        [source.read(name) for name in source.infos]


def test_directory_without_weights(tmp_path):
    with pytest.raises(AtomError, match=r"neither model\.safetensors nor"):
        SafetensorsSource(tmp_path)
