# slmkit's two commands: `make start` runs the main job, `make test` runs the tests. Both make their own environment, .venv.
BUDGET ?= 8m
VENV ?= .venv
EXTRAS ?= dev
comma := ,
TOOLS = $(VENV)/$(subst $(comma),-,$(EXTRAS))-installed
NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c "$(NEW_ENOUGH)" 2>/dev/null && echo $$p && break; done)

.PHONY: start test sync clean

start: $(VENV)/kit-installed
	@$(VENV)/bin/slmkit start --budget $(BUDGET)

test: $(TOOLS)
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/python -m pytest -rs

sync: $(TOOLS)
	@$(VENV)/bin/slmkit sync

# An environment is ready when pip has finished: half an installation is taken up again.
$(VENV)/kit-installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing slmkit into $(VENV): some minutes, most of them for PyTorch."
	$(VENV)/bin/pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# `make test EXTRAS=dev,peers,ray` has the libraries too that some tests compare with or run on.
$(TOOLS): pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing slmkit and its tests' tools into $(VENV): some minutes, most of them for PyTorch."
	$(VENV)/bin/pip install --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@ $(VENV)/kit-installed

$(VENV)/bin/pip:
	@test -n "$(PYTHON)" || { echo "slmkit needs Python 3.11 or newer: none is on the PATH (make PYTHON=/path/to/python3)"; exit 1; }
	@$(PYTHON) -c "$(NEW_ENOUGH)" || { echo "slmkit needs Python 3.11 or newer: $(PYTHON) is older"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

clean:
	rm -rf $(VENV)
