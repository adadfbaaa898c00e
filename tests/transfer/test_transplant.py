"""Whole models given another tokenizer: what is copied, reported, saved and refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import atom_jax
from atom_jax import params
from atom_jax.__main__ import main
from atom_jax.evaluation.reports import transplanted
from atom_jax.models import registry, transformer
from atom_jax.tokenizers import ByteTokenizer, train
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.transfer.lessons import add_tuning
from atom_jax.typing import LM, AtomError, Batch
from tests.transfer.numbers import tokenizer, view

CFG = transformer.TransformerConfig(
    d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, max_length=64, vocab_size=704,
    tie_embeddings=False,
)  # fmt: skip


def model(name="gpt2like", seed=0, **changes):
    tk = tokenizer(name)
    cfg = dataclasses.replace(CFG, **{"bos_id": tk.bos_id, "eos_ids": tk.eos_ids} | changes)
    return LM(cfg, params.init(jax.random.key(seed), transformer.spec(cfg)), tk)


def table(lm):
    return np.stack([np.asarray(lm.params["embed"]), np.asarray(lm.params["unembed"]).T], axis=1)


@pytest.mark.parametrize("name,rows", [("gpt2like", 704), ("gemmalike", 800), ("qwenlike", 1000)])
def test_onto_the_same_tokenizer_nothing_changes(name, rows):
    lm = model(name, vocab_size=rows)
    made, report = atom_jax.transplant(lm, tokenizer(name))
    np.testing.assert_array_equal(table(made), table(lm)[: tokenizer(name).vocab_size])
    assert made.params["layers"] is lm.params["layers"] and report.warnings[:1] in ((), report.warnings)
    assert report.counts["composed"] == report.counts["fallback"] == 0


def test_there_and_back_keeps_shared_rows():
    lm = model("gemmalike", vocab_size=800)
    there, report = atom_jax.transplant(lm, tokenizer("qwenlike"))
    back, _ = atom_jax.transplant(there, tokenizer("gemmalike"))
    both = [ids[0] for piece, ids in view("gemmalike").ids.items() if piece in view("qwenlike").ids]
    assert len(both) > 400
    np.testing.assert_array_equal(table(back)[both], table(lm)[both])
    assert there.config.vocab_size == 1000 and there.config.eos_ids == (2,) == there.tokenizer.eos_ids
    assert report.counts["special"] == 3 and report.counts["byte"] > 0 and sum(report.counts.values()) == 1000
    np.testing.assert_array_equal(table(there)[[0, 1, 2]], table(lm)[[4, 5, 1]])
    assert "1 digits" not in str(report) or view("gemmalike").digits == 1
    stored = json.loads(json.dumps(report.to_json()))
    assert stored["tokenizer_before"] == tokenizer("gemmalike").digest != stored["tokenizer_after"]
    assert len(stored["rows"]) == 1000 and stored["labels"][int(stored["rows"][0])] == "special"


def test_special_tokens_that_are_chosen_and_those_that_collide():
    lm = model("gemmalike", vocab_size=800)
    made, _ = atom_jax.transplant(lm, tokenizer("qwenlike"), special={"<|im_end|>": "<pad>"})
    np.testing.assert_array_equal(table(made)[1], table(lm)[0])
    with pytest.raises(AtomError, match="no special token '<nope>'"):
        atom_jax.transplant(lm, tokenizer("qwenlike"), special={"<|im_end|>": "<nope>"})
    # One token begins and ends texts: as an input it is the former, as an output the latter.
    made, report = atom_jax.transplant(lm, tokenizer("gpt2like"))
    np.testing.assert_array_equal(table(made)[0], [table(lm)[2, 0], table(lm)[1, 1]])
    assert not any("tied" in text for text in report.warnings)
    tied = model("gemmalike", vocab_size=800, tie_embeddings=True)
    made, report = atom_jax.transplant(tied, tokenizer("gpt2like"))
    np.testing.assert_array_equal(made.params["embed"][0], tied.params["embed"][2])
    assert any("tied" in text for text in report.warnings) and "unembed" not in made.params


def test_tables_smaller_than_the_tokenizer_and_other_dtypes():
    lm = model(vocab_size=600)
    lm = dataclasses.replace(lm, params=params.cast(lm.params, jax.numpy.bfloat16))
    made, report = atom_jax.transplant(lm, tokenizer("gpt2like"), fallback="zero")
    assert made.params["embed"].dtype == jax.numpy.bfloat16 and made.params["embed"].shape == (700, 16)
    assert report.counts["exact"] == 599 and report.counts["fallback"] == 100 and not made.params["embed"][650].any()


def test_onto_bytes_and_saved(tmp_path):
    lm = model()
    made, report = atom_jax.transplant(lm, "bytes")
    assert made.config.vocab_size == 264 and report.counts["exact"] == 256
    atom_jax.save_hf(made, tmp_path / "bytes")
    again = atom_jax.load(tmp_path / "bytes")
    assert isinstance(again.tokenizer, ByteTokenizer)
    np.testing.assert_array_equal(again.params["embed"], made.params["embed"])
    assert again.config == made.config


@pytest.mark.parametrize("name, tied", [("qwenlike", False), ("gemmalike", True)])
def test_transformers_reads_what_was_saved(tmp_path, name, tied):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    transformers = pytest.importorskip("transformers", reason="needs the torch extra")
    made, _ = atom_jax.transplant(model(tie_embeddings=tied, vocab_size=704), tokenizer(name))
    atom_jax.save_hf(made, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    kwargs = {"dtype": torch.float32, "output_loading_info": True}
    network, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)
    assert not any(loading.values())
    for text in ("The quick  brown fox; café, 2 × 1990\n", "a<|im_end|>b"):
        ids = made.tokenizer.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == made.tokenizer.decode(ids)
    at = np.arange(len(ids), dtype=np.int32)[None]
    batch = Batch(np.array([ids], np.int32), at, np.ones_like(at), at, at > 0)
    ours = transformer.apply(made.params, batch, cfg=made.config)[0].logits
    with torch.no_grad():
        np.testing.assert_allclose(ours, network(torch.tensor([ids])).logits.numpy(), atol=2e-5)


def test_donor_and_texts():
    lm, donor = model(), model("qwenlike", 1, vocab_size=1008)
    for method in ("omp:k=4", "neighbours", "landmarks"):
        made, report = atom_jax.transplant(lm, tokenizer("qwenlike"), method, donor=donor)
        assert report.counts["interpolated"] > 400 and np.isfinite(table(made)).all()
    texts = [b"the version of the file, and the other files of the documentation " * 20]
    _, report = atom_jax.transplant(lm, tokenizer("qwenlike"), "focus", texts=texts)
    assert report.counts["interpolated"] > 0 and report.counts["fallback"] > report.counts["interpolated"]
    _, report = atom_jax.transplant(lm, tokenizer("qwenlike"), "focus", texts=texts, fallback="fvt")
    assert report.counts["interpolated"] > 0 and report.counts["composed"] > 0 == report.counts["fallback"]
    with pytest.raises(AtomError, match=r"donor: its tokenizer \(gpt2like\) is not the one"):
        atom_jax.transplant(lm, tokenizer("qwenlike"), "omp", donor=lm)


def test_rows_that_were_hardly_trained_are_no_anchors():
    lm, donor = model(), model("qwenlike", 1, vocab_size=1008)
    plain, _ = atom_jax.transplant(lm, tokenizer("qwenlike"), "neighbours", donor=donor)
    picky, report = atom_jax.transplant(lm, tokenizer("qwenlike"), "neighbours", donor=donor, untrained=0.2)
    copied = np.array([label == "exact" for label in report.labels])
    np.testing.assert_array_equal(table(plain)[copied], table(picky)[copied])
    assert (table(plain)[~copied] != table(picky)[~copied]).any()
    with pytest.raises(AtomError, match="untrained: expected a number from 0 to"):
        atom_jax.transplant(lm, tokenizer("qwenlike"), untrained=2.0)


def test_a_donor_that_shares_nothing():
    tk = Tokenizer(models.BPE({chr(0x4E00 + i): i for i in range(9)}, []))
    tk.decoder = decoders.ByteLevel()
    strange = JsonTokenizer.from_files({"tokenizer.json": tk.to_str()}, "strange")
    with pytest.raises(AtomError, match="it has no token for"):
        atom_jax.transplant(model(), strange)


def test_tokenizers_that_change_texts_are_refused():
    for step, name in ((normalizers.NFKC(), "NFKC"), (normalizers.Lowercase(), "Lowercase")):
        tk = Tokenizer.from_str(tokenizer("qwenlike").backend.to_str())
        tk.normalizer = normalizers.Sequence([normalizers.NFC(), step])
        changed = JsonTokenizer.from_files({"tokenizer.json": tk.to_str()}, "changed")
        with pytest.raises(AtomError, match=f"changed: it rewrites texts \\({name}\\)"):
            atom_jax.transplant(model(), changed)


def test_models_that_cannot_be_transplanted():
    with pytest.raises(AtomError, match="no tokenizer"):
        atom_jax.transplant(dataclasses.replace(model(), tokenizer=None), tokenizer("qwenlike"))
    cfg = next(iter(registry.FAMILIES["hnet"].examples().values()))
    with pytest.raises(AtomError, match="only transformers over subwords"):
        atom_jax.transplant(LM(cfg, {}, ByteTokenizer()), tokenizer("qwenlike"))
    with pytest.raises(AtomError, match="no such file"):
        atom_jax.transplant(model(), "no/such/place/at all")


def test_digits_and_templates_are_warned_of():
    grouped = train.train("bpe:300", [b"1990 2000 " * 9])
    cfg = dataclasses.replace(CFG, vocab_size=grouped.vocab_size)
    lm = LM(cfg, params.init(jax.random.key(0), transformer.spec(cfg)), grouped)
    template = json.dumps({"eos_token": "<|bos|>", "chat_template": "{{ x }}"})
    files = {"tokenizer.json": tokenizer("qwenlike").backend.to_str(), "tokenizer_config.json": template}
    _, report = atom_jax.transplant(lm, JsonTokenizer.from_files(files, "chat"))
    assert any("digits of a number, now 1: arithmetic" in w for w in report.warnings)
    assert any("chat template that the model was not tuned with" in w for w in report.warnings)
    assert grouped.chat_template is None


def test_what_tuning_changed_is_carried_over():
    base, tuned = model(), model(seed=1)
    moved, _ = atom_jax.transplant(base, tokenizer("qwenlike"), fallback="zero")
    direct, _ = atom_jax.transplant(tuned, tokenizer("qwenlike"), fallback="zero")
    got = add_tuning(moved, tuned, base)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(direct.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(AtomError, match="tables of the three models"):
        add_tuning(moved, model(seed=1, vocab_size=800), base)


def test_the_command(tmp_path, capsys, monkeypatch):
    lm = model(max_length=512)
    atom_jax.save_hf(lm, tmp_path / "source")
    files = {"tokenizer.json": tokenizer("qwenlike").backend.to_str()}
    (tmp_path / "tokenizer.json").write_text(files["tokenizer.json"])
    flags = [f"--tokenizer={tmp_path / 'tokenizer.json'}", f"--out={tmp_path / 'out'}", "--bytes=600"]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as there:
        there.setattr(transplanted, "draw", interrupted)
        assert main(["atom_jax", "transplant", str(tmp_path / "source"), *flags]) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"source", "tokenizer.json"}
    capsys.readouterr()
    assert main(["atom_jax", "transplant", str(tmp_path / "source"), *flags]) == 0
    said = capsys.readouterr().out
    assert "bits per byte" in said and "composed" in said
    report = json.loads((tmp_path / "out" / "transplant.json").read_text())
    assert report["before"]["bits_per_byte"] > 0 and report["after"]["tokens"] > 0 and report["judged_bytes"] <= 600
    again = atom_jax.load(tmp_path / "out")
    made, _ = atom_jax.transplant(lm, again.tokenizer)
    # Its files name no token that ends texts: found by its name.
    assert again.config.eos_ids == (2,) and (tmp_path / "out" / "transplant.png").stat().st_size > 0
    np.testing.assert_array_equal(again.params["embed"], made.params["embed"])
    for wrong, message in (
        ([*flags], "already exists"), ([flags[0], "--out=x", "--method=best"], "--method 'best': expected fvt"),
        ([flags[0]], "--out is missing"), ([flags[0], "--out=x", "--special=a"], "expected NEW=OLD"),
        ([flags[0], "--out=x", "--method=omp", "--bytes=0"], "--method=omp: needs --donor"),
    ):  # fmt: skip
        assert main(["atom_jax", "transplant", str(tmp_path / "source"), *wrong]) == 1
        assert message in capsys.readouterr().err


def test_a_tokenizer_without_a_splitting_rule_is_fine():
    tk = Tokenizer.from_str(tokenizer("gpt2like").backend.to_str())
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    spaced = JsonTokenizer.from_files({"tokenizer.json": tk.to_str()}, "spaced")
    _, report = atom_jax.transplant(model(), spaced)
    assert any("now get a space in front" in w for w in report.warnings)
