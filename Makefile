# make setup   the environment, in .venv/
# make demo    train a small L-DIT on the embedded sample set and look at it
# make test    every check
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo lint test lock clean

setup: $(VENV)/.installed

# torch first: deepspeed looks at it while it is built, and brings its own CUDA libraries where it has any
$(VENV)/.installed: requirements.lock pyproject.toml
	python3 -m venv $(VENV)
	$(PIP) -c requirements.lock setuptools wheel packaging numpy torch
	$(PIP) --no-deps --no-build-isolation -r requirements.lock
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

test: lint
	$(PY) -m pytest -n 2 --dist loadfile

lock:
	sed -n '/^#/p' requirements.lock > requirements.lock.new
	$(PY) -m pip list --format=freeze | grep -v -E '^(pip|dit-ds)==' | sed 's/+.*//' >> requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf $(VENV) demo runs build *.egg-info
