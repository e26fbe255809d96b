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
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

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

# torch comes first, in the build that this machine's pip finds; what the locks name comes by hash. The last command of each
# adds the package itself, and what a CUDA build of torch wants beside it.
$(USE): $(BIN)/pip pyproject.toml constraints.txt use.lock
	$(BIN)/pip install -q --no-deps -c constraints.txt torch
	$(BIN)/pip install -q --no-deps --require-hashes -r use.lock
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e .
	touch $@

$(DEV): $(USE) dev.lock
	$(BIN)/pip install -q --no-deps --require-hashes -r dev.lock
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
