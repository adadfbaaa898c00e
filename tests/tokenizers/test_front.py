import json

import pytest
import tokenizers as tk

from atom_jax.tokenizers import ByteTokenizer
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer


@pytest.mark.parametrize(("template", "expected"), [("<s> $A", True), ("$A </s>", False), (None, False)])
def test_the_template_says_whether_bos_comes_first(tmp_path, template, expected):
    made = tk.Tokenizer(tk.models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
    if template:
        made.post_processor = tk.processors.TemplateProcessing(template, None, [("<s>", 0), ("</s>", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    tokenizer = JsonTokenizer(tmp_path)
    assert tokenizer.add_bos is expected
    assert tokenizer.encode("a").tolist() == [2]


def test_a_model_without_bos(tmp_path):
    tk.Tokenizer(tk.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    assert JsonTokenizer(tmp_path).add_bos is False


def test_bytes():
    assert ByteTokenizer().add_bos
