"""What tokenizers put before every text: what the `tokenizers` package does with special tokens, declared or not."""

import json

import pytest
import tokenizers as tk

from atom_jax.tokenizers import ByteTokenizer, HNetByteTokenizer, base
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer

IDS = [("<s>", 0), ("</s>", 1), ("<x>", 2)]
TWO = tk.processors.TemplateProcessing("<x> <s> $A", None, IDS)
TEMPLATES = {
    "one": (tk.processors.TemplateProcessing("<s> $A", None, IDS), (0,)),
    "two": (TWO, (2, 0)),
    "another": (tk.processors.TemplateProcessing("<x> $A </s>", None, IDS), (2,)),
    "behind": (tk.processors.TemplateProcessing("$A </s>", None, IDS), ()),
    "bert": (tk.processors.BertProcessing(("</s>", 1), ("<x>", 2)), (2,)),
    "sequence": (tk.processors.Sequence([tk.processors.ByteLevel(), TWO]), (2, 0)),
    "bytes": (tk.processors.ByteLevel(), ()),
    "none": (None, ()),
}


def written(path, template=None, **config):
    made = tk.Tokenizer(tk.models.BPE({"<s>": 0, "</s>": 1, "<x>": 2, "a": 3, "b": 4}, []))
    made.pre_tokenizer, made.decoder = tk.pre_tokenizers.ByteLevel(add_prefix_space=False), tk.decoders.ByteLevel()
    if template is not None:
        made.post_processor = template
    made.save(str(path / "tokenizer.json"))
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_is_obeyed(tmp_path, name, declared):
    template, front = TEMPLATES[name]
    published = written(tmp_path, template, **({"bos_token": "<s>", "eos_token": "</s>"} if declared else {}))
    tokenizer = JsonTokenizer(tmp_path)
    assert tokenizer.front == front and tokenizer.encode("ab").tolist() == [3, 4]
    assert published.encode("ab").ids[: len(front) + 2] == [*front, 3, 4]
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    assert JsonTokenizer(tmp_path / "copy").front == front


@pytest.mark.parametrize("template, explicit, front", [("none", True, (0,)), ("two", False, ()), ("two", True, (0,))])
def test_add_bos_token_has_the_last_word(tmp_path, template, explicit, front):
    written(tmp_path, TEMPLATES[template][0], bos_token="<s>", add_bos_token=explicit)
    assert JsonTokenizer(tmp_path).front == front


def test_add_bos_token_without_a_bos_means_nothing(tmp_path):
    written(tmp_path, TEMPLATES["two"][0], add_bos_token=True)
    assert JsonTokenizer(tmp_path).front == (2, 0)


def test_documents_begin_with_the_front(tmp_path):
    written(tmp_path, TWO)
    assert base.beginning(JsonTokenizer(tmp_path)) == [2, 0]
    written(tmp_path, None, bos_token="<s>", eos_token="</s>")
    assert base.beginning(JsonTokenizer(tmp_path)) == [0]
    written(tmp_path, None, eos_token="</s>")
    assert base.beginning(JsonTokenizer(tmp_path)) == [1]
    (tmp_path / "tokenizer_config.json").unlink()
    assert base.beginning(JsonTokenizer(tmp_path)) == []


def test_bytes():
    assert ByteTokenizer().front == (256,) and HNetByteTokenizer().front == (254,)
