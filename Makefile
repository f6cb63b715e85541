# Each target is the only command a machine with python3 >= 3.11 needs.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
SERVING := .venv-serving
# the parts of the package, as they lie in the wheel: mypy cannot follow the folder mapping of an editable install
TYPED := build/typed

.PHONY: demo test test-serving lint structure clean

demo: $(INSTALLED)
	$(BIN)/gqaprune run demo --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# compares exported files with transformers in the engines themselves; compiles llama.cpp once, in minutes
test-serving: $(SERVING)/installed
	$(SERVING)/bin/python -m pytest tests/serving

lint: $(INSTALLED)
	$(BIN)/ruff check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)/hf_gqaprune
	ln -s $(CURDIR)/hf_gqaprune/* $(CURDIR)/configuration $(CURDIR)/trainer $(CURDIR)/model_cards $(TYPED)/hf_gqaprune/
	MYPYPATH=$(TYPED) $(BIN)/mypy --package hf_gqaprune
	MYPYPATH=$(TYPED) $(BIN)/mypy tests/typing/public_api.py

# folders in order, and who imports whom
structure: $(INSTALLED)
	$(BIN)/python tools/structure.py

# torch goes first and by itself, so that the version the tests ran on is the one that is resolved
$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "python >= 3.11 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install --editable '.[dev,eval,gguf]'
	touch $@

$(SERVING)/installed: pyproject.toml
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install torch==2.13.0
	$(SERVING)/bin/python -m pip install --editable '.[dev,gguf,serving]'
	touch $@

clean:
	rm -rf .venv $(SERVING) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
