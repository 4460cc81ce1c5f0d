# The verbs of the project. Each sets up what it needs in .venv by itself; `make` alone lists them.

PYTHON ?= python3
VENV   ?= .venv
# A build of torch that installs everywhere; it comes first, because a bare "torch" may pull in gigabytes of CUDA.
TORCH  ?= torch==2.13.0
# The folder, on the drive to use, of the demo's and the benchmarks' files.
DIR    ?= build
SEEDS  ?= 25

BIN    := $(VENV)/bin
SOURCE := pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/CMakeLists.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench sanitize torture docs clean

help:  ## list the verbs
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

demo: $(VENV)/.examples | $(DIR)  ## train a GPT in memory and on disk, side by side (three minutes)
	$(BIN)/python examples/train_gpt.py --compare --offload $(DIR)/demo

test: $(VENV)/.dev  ## every test (a few minutes)
	$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.dev  ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h tests/native/*.cpp

bench: $(VENV)/.dev | $(DIR)  ## the benchmarks; DIR=/mnt/nvme chooses the drive
	$(BIN)/python benchmarks/aio.py $(DIR)
	$(BIN)/python benchmarks/step.py $(DIR)
	$(BIN)/python benchmarks/memory.py $(DIR)

sanitize: build/address/test_core build/thread/test_core  ## the C++ core under ASan+UBSan and under TSan
	build/address/test_core build
	build/thread/test_core build

torture: build/address/test_core build/thread/test_core  ## the same for many seeds, with injected faults
	for seed in $$(seq $(SEEDS)); do \
	  build/address/test_core build $$seed && build/thread/test_core build $$seed || exit 1; \
	done

docs: $(VENV)/.dev  ## the API documentation, as pages in build/docs
	$(BIN)/python -m pdoc --docformat google --output-directory build/docs offload_opt

clean:  ## remove what the verbs made, the environment too
	rm -rf $(VENV) build

# The environment. A stamp is older than what it was installed from, or the install is done again.

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.examples: $(VENV)/.torch $(SOURCE)
	$(BIN)/python -m pip install --quiet --editable '.[examples]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCE)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.examples

# The native test driver, with sanitizers.

build/address/test_core: FLAGS = address,undefined
build/thread/test_core: FLAGS = thread
build/%/test_core: $(VENV)/.dev $(wildcard tests/native/*.cpp) $(SOURCE)
	$(BIN)/cmake -S csrc -B build/$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Debug \
	  -DOFFLOAD_OPT_PYTHON=OFF -DOFFLOAD_OPT_NATIVE_TESTS=ON -DOFFLOAD_OPT_SANITIZE=$(FLAGS)
	$(BIN)/cmake --build build/$*

$(DIR):
	mkdir -p $@
