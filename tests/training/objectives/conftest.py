"""A small experiment for every objective that is registered."""

import dataclasses
import signal

import jax
import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.checkpoint import store
from atom_jax.data import vocabulary
from atom_jax.data.sampled import Sampling
from atom_jax.kvcache.dms import DMS
from atom_jax.models import transformer
from atom_jax.models.bolmo import BolmoConfig
from atom_jax.models.image_tokens import Whole
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.training import interrupt
from atom_jax.training.objectives import OBJECTIVES
from atom_jax.transfer.alm import ALM
from atom_jax.transfer.byteify import Stage1
from atom_jax.transfer.hypernet import Projector
from atom_jax.typing import LM
from configs import bolmo, image, world
from configs.mtp import HEADS
from configs.transfer import MAKER, TEACHER
from tests.training.tiny import make

EVICTORS = DMS(form="observed", window=16, scale=1.0, offset=0.0, tau=0.5, bias=True)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A small model over subwords with its tokenizer."""
    cfg = bolmo.tiny_byteify().model.main
    tokenizer = vocabulary.trained_tokenizer(f"bpe:{cfg.vocab_size}", ("austen",))
    path = tmp_path_factory.mktemp("source")
    atom_jax.save_hf(LM(cfg, params.init(jax.random.key(0), transformer.spec(cfg)), tokenizer), path)
    return path


@pytest.fixture(scope="session")
def example(source, tmp_path_factory):
    """name -> an experiment of two steps on eight devices, with validation, from a model that is there already."""
    settings = ["mesh.data=8", "train.steps=2", "train.eval_every=2", "train.eval_batches=1"]
    exp = make(*settings, "optim.schedule=constant", seed=3)
    exp = dataclasses.replace(exp, model=dataclasses.replace(exp.model, layer_types=()))
    base = tmp_path_factory.mktemp("base") / "model"
    store.save_model(
        base, LM(exp.model, params.init(jax.random.key(1), transformer.spec(exp.model)), ByteTokenizer())
    )
    exp = dataclasses.replace(exp, init_from=str(base))
    evicting = dataclasses.replace(exp, model=dataclasses.replace(exp.model, memory=EVICTORS))

    def build(name):
        cls = OBJECTIVES[name]
        if name == "fit":
            data = dataclasses.replace(exp.data, seq_len=256)
            fit = cls(target="attention", windows=1, calibration=1, entries=64)
            return dataclasses.replace(evicting, data=data, fit=fit)
        if name == "distill":
            return dataclasses.replace(evicting, distill=cls(direction="both", cr_start=4.0))
        if name == "images":
            own = image.tiny()
            # With all tokens nothing is drawn.
            own = dataclasses.replace(own, model=dataclasses.replace(own.model, length=Whole()), seed=3)
            return config.override(own, [*settings, "optim.schedule=constant"])
        if name == "byteify":
            main = bolmo.tiny_byteify().model.main
            model = BolmoConfig(main=main, subwords=400, decoder_layers=1, local_heads=2, local_d_ff=48, capacity=1.0)
            data = dataclasses.replace(exp.data, seq_len=96, tokens=48, piece_bytes=256)
            first = dataclasses.replace(
                exp, model=model, data=data, tokenizer="bolmo", init_from="",
                byteify=cls(source=str(source), imitate=Stage1(depth=1)),
            )  # fmt: skip
            return dataclasses.replace(first, first=first, byteify=dataclasses.replace(first.byteify, stage=2))
        if name == "classify":
            small = dataclasses.replace(image.cct_tiny(), objective=cls(), train=exp.train)
            return config.override(small, ["mesh.data=8", "data.batch_size=8"])
        if name == "foresee":
            return config.override(world.tiny(), [*settings, *(f"first.{s}" for s in settings)])
        if name == "alm":
            data, optim = dataclasses.replace(exp.data, tokens=24), dataclasses.replace(exp.optim, groups=TEACHER)
            objective = cls(source=str(source), how=ALM(merge=None))
            return dataclasses.replace(exp, data=data, optim=optim, objective=objective)
        if name == "hypernet":
            net = Projector(1 if exp.model.tie_embeddings else 2, exp.model.d_model, length=3)
            objective = cls(net=net, sampling=Sampling(vocabulary=320, texts=8))
            return dataclasses.replace(exp, optim=dataclasses.replace(exp.optim, groups=MAKER), objective=objective)
        if name == "mtp":
            return dataclasses.replace(exp, optim=dataclasses.replace(exp.optim, groups=HEADS), objective=cls())
        return dataclasses.replace(exp, objective=cls())

    return build


@pytest.fixture
def stop_after(monkeypatch):
    """When it is called, the runs to come are stopped by signals after these of all their steps, counted from 1."""

    def arm(*steps):
        ask, asked = interrupt.Agreement.ask, []

        def stopping(self, interrupted):
            asked.append(1)
            if len(asked) in steps:
                signal.raise_signal(signal.SIGTERM)
                interrupted = True
            return ask(self, interrupted)

        monkeypatch.setattr(interrupt.Agreement, "ask", stopping)

    return arm
