"""array_record files and prepared tfds directories."""

import numpy as np
import pytest

from atom_jax.data.config import DataConfig
from atom_jax.data.pipeline import make_iterator
from atom_jax.data.sources import open_source
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import AtomError

array_record_module = pytest.importorskip("array_record.python.array_record_module")


def write_records(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_array_record(tmp_path):
    records = [b"document %d" % i for i in range(50)]
    write_records(tmp_path / "x.array_record-00000-of-00002", records[:30])
    write_records(tmp_path / "x.array_record-00001-of-00002", records[30:])
    corpus = open_source(str(tmp_path), "all")
    assert [corpus.read(i) for i in range(len(corpus))] == records
    parts = [open_source(str(tmp_path / "x.array_record*"), s) for s in ("train", "validation", "test")]
    assert sorted(p.read(i) for p in parts for i in range(len(p))) == sorted(records)
    assert [len(p) for p in parts] == [46, 2, 2]


def test_array_record_trains(tmp_path):
    write_records(tmp_path / "x.array_record", [b"a" * n for n in range(1, 40)])
    cfg = DataConfig(sources=(str(tmp_path / "x.array_record"),), split="all", seq_len=16, batch_size=2)
    batch = next(make_iterator(cfg, ByteTokenizer()))
    assert set(batch["ids"].ravel()) <= {97, 256, 257}


def test_array_record_not_utf8(tmp_path):
    write_records(tmp_path / "x.array_record", [b"fine"] * 20 + [b"no\xff"])
    corpus = open_source(str(tmp_path / "x.array_record"), "all")
    with pytest.raises(AtomError, match=r"x.array_record, record 20 is not UTF-8 at byte 2\."):
        corpus.read(20)


def test_array_record_damaged(tmp_path):
    (tmp_path / "x.array_record").write_bytes(b"this is no array_record file")
    with pytest.raises(AtomError, match=r"x.array_record cannot be opened as array_record"):
        open_source(str(tmp_path / "x.array_record"), "all")


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs pip install 'atom-jax[tfds]'")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

        def _generate_examples(self, split):
            for i in range(25):
                yield i, {"text": f"{split} {i} é", "n": i}

    builder = Tiny(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_tfds(tfds_directory):
    for split in ("train", "test"):
        corpus = open_source(f"tfds:{tfds_directory}", split)
        assert sorted(corpus.read(i) for i in range(len(corpus))) == sorted(
            f"{split} {i} é".encode() for i in range(25)
        )
    assert len(open_source(f"tfds:{tfds_directory}#text", "all")) == 50
    with pytest.raises(AtomError, match="has no validation split: it has test, train"):
        open_source(f"tfds:{tfds_directory}", "validation")
    with pytest.raises(AtomError, match="has no feature 'body': it has n, text"):
        open_source(f"tfds:{tfds_directory}#body", "train").read(0)
    with pytest.raises(AtomError, match="the text must be bytes"):
        open_source(f"tfds:{tfds_directory}#n", "train").read(0)
    with pytest.raises(AtomError, match=f"write tfds:{tfds_directory}"):
        open_source(str(tfds_directory), "train")


def test_tfds_that_is_none(tmp_path):
    with pytest.raises(AtomError, match="there is no directory"):
        open_source(f"tfds:{tmp_path}/nowhere", "train")
    pytest.importorskip("tensorflow_datasets", reason="needs pip install 'atom-jax[tfds]'")
    with pytest.raises(AtomError, match="is not a prepared array_record dataset"):
        open_source(f"tfds:{tmp_path}", "train")


def test_nothing_but_empty_records(tmp_path, monkeypatch):
    monkeypatch.setattr("atom_jax.data.pipeline._EMPTY_LIMIT", 50)
    write_records(tmp_path / "x.array_record", [b""] * 30)

    class Bare(ByteTokenizer):
        bos_id, eos_ids = None, ()

    cfg = DataConfig((str(tmp_path / "x.array_record"),), split="all", seq_len=16, batch_size=1)
    with pytest.raises(AtomError, match="50 documents in a row without a token"):
        next(make_iterator(cfg, Bare()))
