# Everything from a bare clone: `make test`, `make demo`. PYTHON names the interpreter (3.11 or newer) with which $(VENV)
# is made; one that is there keeps its own.
VENV ?= .venv
RUN = $(VENV)/bin/python
PYTHON ?= $(or $(wildcard $(RUN)),python3)
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VERSION := $(call version,$(PYTHON))

ifeq ($(filter-out 2.7 3.6 3.7 3.8 3.9 3.10,$(VERSION)),)
$(error $(PYTHON) is not Python 3.11 or newer; PYTHON=... names another)
endif
ifneq ($(wildcard $(RUN)),)
ifneq ($(call version,$(RUN)),$(VERSION))
$(error $(VENV) was made with another Python than $(VERSION); remove it or let VENV=... name another directory)
endif
endif

# Empty for a Python that has none.
LOCK := $(wildcard requirements/py$(VERSION).txt)
COMPILERS := $(wildcard requirements/compilers-py$(VERSION).txt)

.PHONY: install compilers lint typecheck test demo lock

install: $(VENV)/installed

# The locked versions are constraints: pip installs what pyproject.toml asks for, at exactly these versions.
$(VENV)/installed: pyproject.toml $(LOCK)
	@$(if $(LOCK),,echo 'There is no lock for Python $(VERSION): installing the newest versions that pyproject.toml allows.')
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(LOCK:%=--constraint %) --editable '.[dev]'
	touch $@

# XLA's compilers for GPU and TPU, with which plans are made. Beside the environment, not in it: jax would look for
# the hardware each time it starts. PYTHONPATH=$(VENV)/compilers shows them to a plan.
compilers: $(VENV)/compilers/installed

$(VENV)/compilers/installed: $(or $(COMPILERS),$(VENV)/installed) | install
	@$(if $(COMPILERS),,echo 'There is no list of compilers for Python $(VERSION): installing those of the installed jax.')
	$(if $(COMPILERS),,$(RUN) requirements/compilers.py > $(VENV)/compilers.txt)
	rm -rf $(VENV)/compilers
	$(RUN) -m pip install --quiet --no-deps --target $(VENV)/compilers \
		--requirement $(or $(COMPILERS),$(VENV)/compilers.txt)
	touch $@

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

typecheck: install
	$(VENV)/bin/mypy

test: install
	$(RUN) -m pytest -n 4 --dist loadscope --durations=10 -p tests.processor_time

# They are made for Linux on x86-64 only; elsewhere the tests of plans are skipped.
ifeq ($(shell uname -sm),Linux x86_64)
test: compilers
endif

demo: install
	$(RUN) -m s1jax.demo demo-output

# Write the lock for this interpreter from what is installed in $(VENV).
lock:
	$(RUN) -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements/py$(VERSION).txt
