# make setup       the environment, in .venv/
# make demo        train a small L-DIT on the embedded sample set and look at it
# make test        every check but the slow ones
# make test-fast   a minute's choice of the tests, for the inner loop
# make test-all    every check, before a release
# make test-wheel  the package as it is installed: built, put into a fresh environment, run outside the clone
# make docs        the documentation as a site, in site/; strictly: a broken link fails
# make test-newest optional: private names and golden losses with the newest torch, DeepSpeed, transformers and xformers
# with another Python: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON := python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo lint test test-not-slow test-fast test-all test-wheel docs test-newest lock clean

setup: $(VENV)/.installed

# torch first: deepspeed looks at it while it is built, and brings its own CUDA libraries and triton where it has any
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	grep -v '^triton==' requirements.lock > $(VENV)/without_triton.txt
	$(PIP) -c $(VENV)/without_triton.txt setuptools wheel packaging numpy torch
	locked=requirements.lock; if $(PY) -c 'import triton' 2>/dev/null; then locked=$(VENV)/without_triton.txt; fi; \
		$(PIP) --no-deps --no-build-isolation -r $$locked
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	@$(PY) benchmarks/demo.py

# style, types, and imports that run downwards only
lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

# four at once keep two cores busy; a file's tests stay together, for what they share; files are handed out in the order
# of tests/conftest.py; a pytest process that dies ends the run, which otherwise may wait for it without end
PYTEST := $(PY) -m pytest -n 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test: setup
	@$(MAKE) --no-print-directory -j 2 lint test-not-slow

test-not-slow: setup
	$(PYTEST) -m "not slow"

test-fast: setup
	$(PYTEST) -m fast

# two at once: the slow ones take both cores by themselves, and have time limits
test-all: lint
	$(PYTEST) -n 2

test-wheel: setup
	$(PY) -m pytest tests/test_wheel.py

docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# another environment, of whatever is the newest today: all that pyproject.toml bounds is upgraded past the bounds
NEWEST := .venv-newest
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check setuptools wheel packaging numpy torch
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev]'
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --upgrade \
		torch torchvision deepspeed transformers xformers
	$(NEWEST)/bin/python -m pytest tests/test_upstream.py
	$(NEWEST)/bin/python benchmarks/golden.py --check

lock:
	sed -n '/^#/p' requirements.lock > requirements.lock.new
	$(PY) -m pip list --format=freeze | grep -v -E '^(pip|dit-ds)==' | sed 's/+.*//' >> requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf $(VENV) $(NEWEST) demo runs build dist site *.egg-info
