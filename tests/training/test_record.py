import json
import math
import types

import pytest

from atom_jax.training import plots, record
from atom_jax.training.plots import draw
from atom_jax.training.record import Recorder, read, rewind
from atom_jax.training.watch import WINDOW, Watch
from atom_jax.typing import AtomError


def metrics(loss=1.0, bad=0, **more):
    return {"loss": loss, "bits_per_byte": loss / math.log(2), "grad_norm": 1.0, "learning_rate": 0.1,
            "tokens": 64, "bytes": 64, "bad": bad, **more}  # fmt: skip


def write(workdir, first, last, steps=10):
    recorder = Recorder(workdir, first, steps, 2, enabled=True)
    for step in range(first + 1, last + 1):
        recorder.step(step, metrics(loss=1.0 / step if step != 3 else math.nan))
    recorder.validation(last, {"loss": 2.0, "bits_per_byte": 3.0})
    recorder.close()


def test_a_run_cut_off_and_continued_has_every_line_once(tmp_path):
    write(tmp_path, 0, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "kind": "tra')
    write(tmp_path, 4, 10)
    lines = read(tmp_path / "metrics.jsonl")
    assert [(x["step"], x["kind"]) for x in lines] == [(n, "train") for n in (2, 4, 6, 8, 10)] + [(10, "validation")]
    assert lines[1]["loss"] == 0.25 and "tokens_per_second" in lines[1]


def test_speed_is_told_in_what_is_read(tmp_path, monkeypatch, capsys):
    now = iter(range(100))
    monkeypatch.setattr(record, "time", types.SimpleNamespace(monotonic=lambda: float(next(now))))
    recorder = Recorder(tmp_path, 0, 2, 1, enabled=True, unit=("images", 16))
    for step in (1, 2):
        recorder.step(step, {"loss": 1.0, "tokens": 64})
    recorder.close()
    first, second = read(tmp_path / "metrics.jsonl")
    assert second["images_per_second"] == 64 / 16 and not {"tokens_per_second", "images_per_second"} & first.keys()
    assert "images/s" in capsys.readouterr().err
    monkeypatch.undo()
    assert [f.name for f in draw(tmp_path)] == ["loss.png", "optimizer.png", "throughput.png"]


def test_nan_is_null(tmp_path):
    recorder = Recorder(tmp_path, 0, 1, 1, enabled=True)
    recorder.step(1, metrics(loss=math.nan))
    recorder.close()
    (line,) = read(tmp_path / "metrics.jsonl")
    assert line["loss"] is None and line["learning_rate"] == 0.1


def test_other_processes_write_nothing(tmp_path):
    recorder = Recorder(tmp_path, 0, 1, 1, enabled=False)
    recorder.step(1, metrics())
    recorder.validation(1, {"loss": 1.0, "bits_per_byte": 1.0})
    recorder.sample(1, "text")
    recorder.close()
    assert not list(tmp_path.iterdir())


def test_rewinding_keeps_a_missing_file_missing(tmp_path):
    rewind(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_tensorboard_reads_the_events(tmp_path):
    import struct

    from tensorboardX.proto.event_pb2 import Event

    recorder = Recorder(tmp_path, 0, 2, 1, enabled=True)
    recorder.step(1, metrics(loss=0.5))
    recorder.sample(1, "hello")
    recorder.close()
    (file,) = (tmp_path / "tb").iterdir()
    data, events = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    values = {v.tag: v for e in events for v in e.summary.value}
    assert values["train/loss"].simple_value == 0.5
    assert values["sample/text_summary"].tensor.string_val == [b"hello"]


def test_a_directory_that_vanished_is_named(tmp_path):
    recorder = Recorder(tmp_path, 0, 2, 1, enabled=True)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(AtomError, match="metrics of step 1 cannot be written"):
        recorder.step(1, metrics())
    recorder.close()


def test_plots(tmp_path):
    assert draw(tmp_path) == []
    write(tmp_path, 0, 6)
    files = draw(tmp_path)
    assert [f.name for f in files] == ["loss.png", "optimizer.png", "throughput.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)


def test_plots_of_learned_units(tmp_path):
    learned = {"bytes_per_unit_0": 4.0, "bytes_per_unit_1": 9.0, "lost_0": 0.0, "lost_1": 0.1, "at_word_edge": 0.5,
               "at_character_edge": 1.0}  # fmt: skip
    recorder = Recorder(tmp_path, 0, 4, 2, enabled=True)
    for step in (1, 2, 3, 4):
        recorder.step(step, metrics(**learned))
    recorder.close()
    files = draw(tmp_path)
    assert [f.name for f in files] == ["loss.png", "optimizer.png", "throughput.png", "units.png"]
    assert files[-1].read_bytes().startswith(b"\x89PNG")
    assert plots._units_page(2)["bytes per unit"] == {"bytes_per_unit_0": "stage 0", "bytes_per_unit_1": "stage 1"}


def test_plots_of_a_run_without_rates(tmp_path):
    line = {"step": 1, "kind": "train", "loss": None, "bits_per_byte": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert len(draw(tmp_path)) == 3


def test_skipped_steps_are_named_and_end_the_run():
    watch = Watch(max_bad_steps=3)
    assert watch.look(1, metrics()) == ""
    assert watch.look(2, metrics(loss=math.nan, bad=1)).startswith("step 2: loss nan")
    watch.look(3, metrics(loss=math.nan, bad=2))
    with pytest.raises(AtomError, match="3 steps in a row, from step 2 on"):
        watch.look(4, metrics(loss=math.nan, bad=3))


def test_spikes_are_named():
    watch = Watch(max_bad_steps=3)
    for step in range(WINDOW):
        assert watch.look(step, metrics(loss=3.0 + 0.1 * (step % 3))) == ""
    assert watch.look(60, metrics(loss=3.5)) == ""
    assert "step 61: loss 9.000 is far above the usual 3.1" in watch.look(61, metrics(loss=9.0))
