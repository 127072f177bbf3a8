# Everything from a bare clone: `make test`, `make demo`. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
LOCK = requirements/py$(VERSION).txt

COMPILERS = requirements/compilers-py$(VERSION).txt

.PHONY: install compilers lint typecheck test demo lock

install: $(VENV)/installed

# The locked versions are constraints: pip installs what pyproject.toml asks for, at exactly these versions.
$(VENV)/installed: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint $(LOCK) --editable '.[dev]'
	touch $@

# XLA's compilers for GPU and TPU, with which plans are made. Beside the environment, not in it: jax would look for
# the hardware each time it starts. PYTHONPATH=$(VENV)/compilers shows them to a plan.
compilers: $(VENV)/compilers/installed

$(VENV)/compilers/installed: $(COMPILERS) | install
	rm -rf $(VENV)/compilers
	$(RUN) -m pip install --quiet --no-deps --target $(VENV)/compilers --requirement $(COMPILERS)
	touch $@

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

typecheck: install
	$(VENV)/bin/mypy

test: install compilers
	$(RUN) -m pytest -n 3 --dist loadscope

demo: install
	$(RUN) -m s1jax.demo demo-output

# Write the lock for this interpreter from what is installed in $(VENV).
lock:
	$(RUN) -m pip freeze --exclude-editable | sed 's/+cpu$$//' > $(LOCK)
