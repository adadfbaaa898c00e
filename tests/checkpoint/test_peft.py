"""LoRA in PEFT's format, in and out."""

import dataclasses
import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import checkpoint
from atom_jax.__main__ import main
from atom_jax.checkpoint import cli, store
from atom_jax.checkpoint.safetensors_io import SafetensorsSource, write_file
from atom_jax.models import lora
from atom_jax.models.lora import LoRA
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError
from tests.models import test_lora
from tests.models.test_lora import SOME, batch, model

ALL = LoRA(rank=2, alpha=1.0)
BASE = "base_model.model.model.layers.1"


def tuned(tune=SOME) -> LM:
    cfg, p = model(tune=tune)
    return LM(cfg, p, ByteTokenizer())


def without(lm: LM) -> LM:
    layers = {k: v for k, v in lm.params["layers"].items() if k != "lora"}
    return LM(lora.without(lm.config), {**lm.params, "layers": layers}, lm.tokenizer)


def logits(lm: LM):
    return np.asarray(test_lora.logits(lm.params, lm.config))


@pytest.fixture
def saved(tmp_path):
    """(a model with LoRA beside its weights, the model without as a directory, LoRA alone)."""
    lm = tuned()
    checkpoint.save_hf(without(lm), tmp_path / "base")
    atom_jax.save_adapter(lm, tmp_path / "lora", name="a/base")
    return lm, tmp_path / "base", tmp_path / "lora"


def edit(path, **fields):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_names_and_shapes_are_those_of_peft(tmp_path):
    lm = tuned(ALL)
    atom_jax.save_adapter(lm, tmp_path)
    source = SafetensorsSource(tmp_path / "adapter_model.safetensors")
    shapes = {name.removeprefix(BASE): i.shape for name, i in source.infos.items() if name.startswith(BASE)}
    assert shapes == {
        ".self_attn.q_proj.lora_A.weight": (2, 32), ".self_attn.q_proj.lora_B.weight": (32, 2),
        ".self_attn.k_proj.lora_A.weight": (2, 32), ".self_attn.k_proj.lora_B.weight": (16, 2),
        ".self_attn.v_proj.lora_A.weight": (2, 32), ".self_attn.v_proj.lora_B.weight": (16, 2),
        ".self_attn.o_proj.lora_A.weight": (2, 32), ".self_attn.o_proj.lora_B.weight": (32, 2),
        ".mlp.gate_proj.lora_A.weight": (2, 32), ".mlp.gate_proj.lora_B.weight": (48, 2),
        ".mlp.up_proj.lora_A.weight": (2, 32), ".mlp.up_proj.lora_B.weight": (48, 2),
        ".mlp.down_proj.lora_A.weight": (2, 48), ".mlp.down_proj.lora_B.weight": (32, 2),
    }  # fmt: skip
    assert len(source.infos) == 2 * len(shapes)
    table = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (table["peft_type"], table["r"], table["lora_alpha"], table["bias"]) == ("LORA", 2, 1.0, "none")
    assert table["target_modules"] == [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
    said = cli.info(str(tmp_path))
    assert "LoRA, as PEFT has it" in said and "rank 2, alpha 1, beside q, k, v, o, gate, up, down" in said
    edit(tmp_path, bias="all")
    with pytest.raises(AtomError, match="bias is all"):
        cli.info(str(tmp_path))


def test_base_and_corrections_are_the_whole(saved, tmp_path):
    lm, base, path = saved
    wanted = logits(lm)
    again = atom_jax.load(base, adapter=path)
    assert again.config == lora.without(lm.config)
    np.testing.assert_allclose(logits(again), wanted, atol=2e-5)
    assert checkpoint.load_config(base, str(path))[0] == again.config
    half = atom_jax.load(base, adapter=str(path), dtype="bfloat16")
    assert half.params["layers"]["attn"]["q"].dtype == jnp.bfloat16
    checkpoint.save_hf(lm, tmp_path / "merged")
    np.testing.assert_allclose(logits(checkpoint.load(tmp_path / "merged")), wanted, atol=2e-5)
    twice = atom_jax.load(base, adapter=f"{path},{path}")
    difference = [x["layers"]["attn"]["q"] - again.params["layers"]["attn"]["q"] for x in (twice.params, lm.params)]
    np.testing.assert_allclose(difference[0], -difference[1], atol=1e-6)


def test_orbax_directories_keep_both_until_they_are_loaded(saved, tmp_path, capsys):
    lm, base, path = saved
    store.save_model(tmp_path / "run", lm)
    merged = checkpoint.load(tmp_path / "run")
    assert merged.config == lora.without(lm.config) and checkpoint.load_config(tmp_path / "run")[0] == merged.config
    chex.assert_trees_all_equal(checkpoint.load(tmp_path / "run", merge=False).params, lm.params)
    assert "llama" in cli.info(str(tmp_path / "run"))
    assert main(["atom_jax", "adapter", str(tmp_path / "run"), str(tmp_path / "alone")]) == 0
    chex.assert_trees_all_equal(atom_jax.load(base, adapter=tmp_path / "alone").params, merged.params)
    assert main(["atom_jax", "merge", str(base), str(tmp_path / "whole"), f"--adapter={path}"]) == 0
    chex.assert_trees_all_equal(atom_jax.load(tmp_path / "whole").params, merged.params)
    assert main(["atom_jax", "merge", str(base), str(tmp_path / "whole")]) == 1
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, r'adapter_config\.json: peft_type is IA3; only "LORA" is supported'),
        ({"use_dora": True}, "use_dora is True; only false"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which changes the weights too"),
        ({"r": 5}, r"lora_A\.weight' is \(3, 32\); adapter_config\.json asks for \(5, 32\)"),
        ({"r": None}, "r is missing|the field r"),
        ({"lora_alpha": "x"}, "lora_alpha"),
    ],
)
def test_other_corrections_are_refused(saved, fields, message):
    _, base, path = saved
    edit(path, **fields)
    with pytest.raises(AtomError, match=message):
        atom_jax.load(base, adapter=path)


def test_scale_by_the_root_of_the_rank(saved):
    lm, base, path = saved
    edit(path, use_rslora=True, modules_to_save=[], rank_pattern={}, some_new_field=3)
    scaled = dataclasses.replace(SOME, alpha=SOME.alpha * SOME.rank**0.5)
    wanted = lora.merged(lm.params, scaled)
    chex.assert_trees_all_close(atom_jax.load(base, adapter=path).params, wanted, atol=1e-6)


def test_tensors_that_correct_something_else_are_refused(saved, tmp_path):
    lm, base, path = saved
    source = SafetensorsSource(path / "adapter_model.safetensors")
    tensors = {name: source.read(name) for name in source.infos}
    file = path / "adapter_model.safetensors"
    write_file(tensors | {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 32), np.float32)}, file)
    with pytest.raises(AtomError, match=r"lm_head\.lora_A\.weight is no correction of a projection"):
        atom_jax.load(base, adapter=path)
    write_file(dict(list(tensors.items())[1:]), file)
    with pytest.raises(AtomError, match="missing tensor"):
        atom_jax.load(base, adapter=path)
    file.unlink()
    (path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(AtomError, match="pickled weights are never loaded"):
        atom_jax.load(base, adapter=path)
    with pytest.raises(AtomError, match="no learned evictors"):
        atom_jax.save_adapter(without(lm), tmp_path / "x")


def test_peft_computes_the_same(saved, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    transformers = pytest.importorskip("transformers", reason="needs the torch extra")
    peft = pytest.importorskip("peft", reason="needs the torch extra")
    lm, base, path = saved
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor(np.asarray(batch().ids))
    theirs = peft.PeftModel.from_pretrained(plain, path)
    with torch.no_grad():
        np.testing.assert_allclose(logits(lm), theirs(ids).logits.numpy(), atol=1e-4)
    # And what PEFT writes is read.
    for name, x in theirs.named_parameters():
        if "lora_" in name:
            x.data.normal_(0.0, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(ids).logits.numpy()
    np.testing.assert_allclose(logits(atom_jax.load(base, adapter=tmp_path / "theirs")), expected, atol=1e-4)
