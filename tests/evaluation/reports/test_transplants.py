"""Several transplants next to each other, stopped and continued."""

import json

import pytest

import atom_jax
from atom_jax.__main__ import main
from atom_jax.evaluation.reports import transplants
from atom_jax.evaluation.reports.transplants import Orders
from atom_jax.typing import AtomError
from tests.transfer.numbers import tokenizer
from tests.transfer.test_transplant import model


def test_a_table_that_goes_on(tmp_path, capsys, monkeypatch):
    source, donor, other = (str(tmp_path / name) for name in ("source", "donor", "tokenizer.json"))
    atom_jax.save_hf(model(max_length=512), source)
    atom_jax.save_hf(model("qwenlike", 1, vocab_size=1000, max_length=512), donor)
    (tmp_path / "tokenizer.json").write_text(tokenizer("qwenlike").backend.to_str())
    flags = [source, f"--tokenizer={other}", f"--out={tmp_path / 'out'}", "--bytes=300", f"--trained={donor}"]
    omp = ["--method=fvt", "--method=omp:k=4"]
    judge, asked = transplants._judged, []

    def stopping(key, judged):
        asked.append(key["method"])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return judge(key, judged)

    monkeypatch.setattr(transplants, "_judged", stopping)
    assert main(["atom_jax", "transplants", *flags, "--method=fvt"]) == 130 and asked == ["", "fvt", ""]
    assert main(["atom_jax", "transplants", *flags, *omp, f"--donor={other}={donor}"]) == 0
    assert asked == ["", "fvt", "", "omp:k=4", ""]
    rows = [json.loads(line) for line in (tmp_path / "out" / transplants.ROWS).read_text().splitlines()]
    assert [row["method"] for row in rows] == ["", "fvt", "omp:k=4", ""] and rows[0]["source"] == source
    assert rows[-1]["source"] == donor and all(row["bits_per_byte"] > 0 for row in rows)
    table = (tmp_path / "out" / transplants.TABLE).read_text()
    assert table.count("\n| ") == 5 and "| 1.000 |" in table and "omp:k=4" in table
    capsys.readouterr()
    for wrong, message in (
        ([flags[0]], "--tokenizer is missing"),
        ([*flags, "--donor=x"], "expected TOKENIZER=MODEL"),
        ([*flags, "--donor=x=y"], "there is no --tokenizer=x"),
        ([*flags, *omp], "--method=omp:k=4: needs --donor"),
        ([*flags, *omp, "--donor=x=y"], "a model that has each --tokenizer already"),
    ):
        assert main(["atom_jax", "transplants", *wrong]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(AtomError, match="--bytes=0"):
        transplants.compare(Orders(source, (other,), nbytes=0), str(tmp_path / "none"), print)
