# make demo       the pocket world, end to end, in minutes
# make test       the suite, at most 10 minutes on 2 cores;   make test-slow: the long tests, at most 30
# make policy     rebuild the pocket world's policy from scratch, into build/policy
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo install test test-slow format policy clean

demo: $(VENV)/.installed
	$(BIN)/anchored demo --out runs/demo

install: $(VENV)/.installed

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

policy: $(VENV)/.installed
	$(BIN)/python -m anchored.pocket.build --out build/policy

clean:
	rm -rf $(VENV) build *.egg-info

# torch goes first, by its pin: a looser request would fetch another build of it, with gigabytes of CUDA libraries
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "anchored needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
