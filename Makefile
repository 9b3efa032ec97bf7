# Two commands for people (`make quickstart`, `make test`); .ci/run calls `make test` too.

# Where the environment goes; about 8 GB with axolotl's CUDA build of torch.
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed-$(shell cat pyproject.toml | cksum | cut -d' ' -f1)

export AXOLOTL_DO_NOT_TRACK ?= 1

.PHONY: quickstart test clean

quickstart: $(STAMP)
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python quickstart/run.py

test: $(STAMP)
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pytest --numprocesses 2 --dist loadfile

$(STAMP):
	./find-python -m venv --clear $(VENV)
	@echo "Installing axolotl 0.21 and what it needs into $(VENV): about 5 minutes, 8 GB."
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet ".[quickstart,test]"
	touch $@

clean:
	rm -rf $(VENV) quickstart-run
