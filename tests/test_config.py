import dataclasses
import json

import pytest

from atom_jax import config
from atom_jax.models import registry
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn.rope import RopeScaling
from atom_jax.typing import AtomError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    names: tuple[str, ...] = ()
    limit: int | None = None
    flag: bool = False


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    steps: int = 3


def test_overrides_are_read_with_the_type_of_the_field():
    cfg = config.override(
        Outer(), ["inner.rate=3e-4", "inner.names=a, b", "inner.limit=7", "inner.flag=true", "steps=1e3"]
    )
    assert cfg == Outer(Inner(3e-4, ("a", "b"), 7, True), 1000)
    assert config.override(cfg, ["inner.limit=none"]).inner.limit is None


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("inner.speed=1", "flag, limit, names, rate"),
        ("steps=fast", "not an integer"),
        ("steps=1.5", "not an integer"),
        ("inner.flag=perhaps", "true or false"),
        ("steps", "NAME=VALUE"),
        ("steps.deeper=1", "no field 'deeper'"),
    ],
)
def test_a_wrong_override_is_refused_with_what_would_be_right(setting, words):
    with pytest.raises(AtomError, match=words) as e:
        config.override(Outer(), [setting])
    assert setting in str(e.value)


def test_json_round_trip_keeps_types():
    cfg = TransformerConfig(rope_scaling=RopeScaling("llama3", factor=8.0), layer_types=("full",) * 4, eos_ids=(1, 2))
    data = json.loads(json.dumps(config.to_json(cfg)))
    assert config.from_json(object, data) == cfg


def test_json_with_unknown_or_mistyped_fields_is_refused():
    data = config.to_json(Outer())
    with pytest.raises(AtomError, match=r"unknown field 'speed'; valid fields: rate, names"):
        config.from_json(Outer, {**data, "inner": {"speed": 1}})
    with pytest.raises(AtomError, match=r"config\.steps: expected int"):
        config.from_json(Outer, {"steps": "many"})
    with pytest.raises(AtomError, match="unknown class 'Nothing'"):
        config.from_json(object, {"class": "Nothing"})


def test_diff_names_the_leaves_that_differ():
    assert config.diff(Outer(), Outer(Inner(rate=2.0), 4)) == ["inner.rate: 1.0 -> 2.0", "steps: 3 -> 4"]


def test_config_files_choose_a_variant(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("VARIANTS = {'a': lambda: 1, 'b': lambda: 2}\n")
    assert config.load_file(str(file)) == 1
    assert config.load_file(f"{file}:b") == 2
    with pytest.raises(AtomError, match="has a, b"):
        config.load_file(f"{file}:c")
    with pytest.raises(AtomError, match="there is no file"):
        config.load_file(str(tmp_path / "none.py"))


def test_a_name_belongs_to_one_class():
    for kind in registry.KINDS.values():
        for cfg in kind.examples().values():
            assert config.from_json(object, json.loads(json.dumps(config.to_json(cfg)))) == cfg
    with pytest.raises(AtomError, match="has a configuration of the name Fixed, too"):
        config.register(dataclasses.make_dataclass("Fixed", []))
