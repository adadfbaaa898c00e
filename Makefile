# Two commands do everything: `make quickstart` and `make test`. PYTHON chooses the interpreter; another one than
# python3 has an environment of its own.
PYTHON ?= python3
VENV ?= .venv$(patsubst %,-%,$(filter-out python3,$(notdir $(PYTHON))))
BIN := $(VENV)/bin
EXTRAS ?= gguf,tfds,dev

AOT := .venv-aot
TARGETS ?= v5e,v5p,v6e,h100

.PHONY: quickstart test check lint install install-torch install-kvpress smollm2 evaldata parallel dna english heldout \
  bench bench-kv aot clean help

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed-core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-$(EXTRAS): $(VENV)/.installed-core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	touch '$@'

install: $(VENV)/.installed-$(EXTRAS)  ## create the environment with the development extras

quickstart: $(VENV)/.installed-core  ## train a model that finds its own units in six novels; show them (minutes)
	$(BIN)/python train.py --config=configs/units.py:quick --workdir=runs/quickstart
	$(BIN)/python -m atom_jax summary runs/quickstart

lint: $(VENV)/.installed-$(EXTRAS)  ## style and obvious mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile

check: lint  ## lint, then the quick tests
	$(PYTEST) -m "not slow"

test: lint  ## lint, then the whole test suite
	$(PYTEST)

install-torch: $(VENV)/.installed-core  ## PyTorch and transformers, for the live parity tests and the benchmark
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch$(TORCH)' --editable '.[torch]'

.venv-kvpress/.installed:
	$(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-kvpress/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 kvpress==0.5.5
	touch $@

install-kvpress: .venv-kvpress/.installed  ## kvpress and what it needs in an environment of its own, for bench-kv

smollm2: $(VENV)/.installed-$(EXTRAS)  ## fetch SmolLM2-135M-Instruct (Q4_1, dequantized) to models/
	$(BIN)/python -m atom_jax.data.fetch smollm2

evaldata: $(VENV)/.installed-core  ## fetch the offline evaluation sets to evaldata/
	$(BIN)/python -m atom_jax.data.fetch evaldata

parallel: $(VENV)/.installed-core  ## fetch texts in seven languages to corpora/parallel/ (needs apt-get)
	$(BIN)/python -m atom_jax.data.fetch parallel

dna: $(VENV)/.installed-core  ## fetch genomes of bacteria to corpora/dna/ (needs apt-get)
	$(BIN)/python -m atom_jax.data.fetch dna

english: $(VENV)/.installed-core  ## fetch long English documents to corpora/english/ (needs apt-get)
	$(BIN)/python -m atom_jax.data.fetch english

heldout: $(VENV)/.installed-core  ## fetch English texts to evaluate on to corpora/heldout/ (needs apt-get)
	$(BIN)/python -m atom_jax.data.fetch heldout

bench: $(VENV)/.installed-$(EXTRAS) smollm2  ## our speed next to PyTorch's, one table
	$(BIN)/python -m benchmarks.lm

bench-kv: $(VENV)/.installed-$(EXTRAS) smollm2 heldout install-kvpress  ## cache policies next to kvpress's; decoding speed
	$(BIN)/python -m benchmarks.kv

# One environment holds both compilers; where one of them cannot be had, the other still runs.
$(AOT)/.installed: $(VENV)/.installed-core
	test -x $(AOT)/bin/python || $(PYTHON) -m venv $(AOT)
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	for packages in "jax[tpu]==$$version" "jax==$$version jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version"; do \
	  $(AOT)/bin/python -m pip install --quiet --disable-pip-version-check $$packages || true; \
	done; \
	$(AOT)/bin/python -c 'import jax' && touch $@

aot: $(VENV)/.installed-core  ## compile every kernel for TPUs and an H100 that need not be there; one table (minutes)
	@if $(MAKE) --no-print-directory $(AOT)/.installed; then \
	  $(AOT)/bin/python -m pallas_kernels.compile_report --targets=$(TARGETS) $(AOTFLAGS); \
	else echo "aot: jax's compilers for TPU and CUDA cannot be installed here, so nothing was compiled"; fi

clean:  ## remove environments and caches (not models/, evaldata/, corpora/ and runs/)
	rm -rf .venv* .cache .pytest_cache .ruff_cache .hypothesis *.egg-info
