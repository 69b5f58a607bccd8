# `make serve` and `make test` set themselves up: virtual environment, packages, default model. Run them again at any time.
#
#   PYTHON     interpreter the virtual environment is made with (3.11 or newer)
#   PIP_ARGS   more arguments for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu
#   ARGS       more arguments for `dsla serve` or `pytest`

PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
ARGS     ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV   := $(VENV)/.installed-dev

.PHONY: serve test check setup model clean

serve: setup
	$(BIN)/dsla serve $(ARGS)

test: $(DEV) model
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal $(ARGS)

check: $(DEV)
	$(BIN)/ruff check src tests
	$(BIN)/mypy

setup: $(STAMP)

model: setup
	@$(BIN)/dsla fetch

# The stamp comes last: an interrupted set-up is done again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: dsla needs Python 3.11 or newer, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)."; \
	  echo "       Install one and name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
	@if [ "$$(uname -s)" = Linux ] && [ -z "$(PIP_ARGS)" ] && ! command -v nvidia-smi > /dev/null; then \
	  echo "No NVIDIA GPU found. PyTorch's CPU build saves some GB, where pip would take the CUDA one:"; \
	  echo "  make $(MAKECMDGOALS) PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'"; fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[cli,gguf,serve]'
	@touch $@

# What evaluation and the tests need beside that is several times as much.
$(DEV): $(STAMP)
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[all,dev]'
	@touch $@

clean:
	rm -rf $(VENV)
