# For people: `make quickstart`, `make test`, and `make check` while working. .ci/run calls `make test`.

# Where the environment goes; about 8 GB with axolotl's CUDA build of torch.
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed-$(shell cat pyproject.toml | cksum | cut -d' ' -f1)

export AXOLOTL_DO_NOT_TRACK ?= 1

# What `make check` runs: no model is trained, no process is started but one.
QUICK = tests/test_objectives.py tests/test_methods.py tests/test_loss.py tests/test_layers.py \
	tests/test_sampler.py tests/test_configs.py tests/test_report.py

.PHONY: quickstart notebook test check lint clean

quickstart: $(STAMP)
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python example_configs/quickstart/run.py

notebook: $(STAMP)
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	$(BIN)/pip install --quiet ipykernel nbconvert
	$(BIN)/python example_configs/quickstart/smollm2.py
	rm -rf quickstart-run/notebook
	mkdir -p quickstart-run/notebook/HuggingFaceTB
	ln -s ../../SmolLM2-135M-Instruct quickstart-run/notebook/HuggingFaceTB
	cp quickstart/quickstart.ipynb quickstart-run/notebook
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False quickstart-run/notebook/quickstart.ipynb
	$(BIN)/python -m nbconvert --to notebook --inplace --coalesce-streams quickstart-run/notebook/quickstart.ipynb
	cp quickstart-run/notebook/quickstart.ipynb quickstart

test: lint
	@echo "All tests: 15 to 20 minutes on two cores."
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pytest --numprocesses 2 --dist loadfile

check: lint
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pytest -q $(QUICK)

lint: $(STAMP)
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --output-format min-text --python-interpreter-path $(BIN)/python

$(STAMP):
	./find-python -m venv --clear $(VENV)
	@echo "Installing axolotl 0.21 and what it needs into $(VENV): about 5 minutes, 8 GB."
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet ".[quickstart,test]"
	touch $@

clean:
	rm -rf $(VENV) quickstart-run
