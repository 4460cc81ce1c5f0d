# The verbs of the project. Each sets up what it needs in .venv by itself; `make` alone lists them.

PYTHON ?= python3
VENV   ?= .venv
# A build of torch that installs everywhere; it comes first, because a bare "torch" may pull in gigabytes of CUDA.
TORCH  ?= torch==2.13.0
# The folder, on the drive to use, of the demo's and the benchmarks' files.
DIR    ?= build
# Of `make torture`: seeded fault plans, kills, power losses in each recorded run, and runs of random calls.
PLANS  ?= 10000
KILLS  ?= 200
CUTS   ?= 100
RUNS   ?= 1000

BIN    := $(VENV)/bin
SOURCE := pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/CMakeLists.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench sanitize torture docs clean

help:  ## list the verbs
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

demo: $(VENV)/.examples  ## train a GPT in memory and on disk, and once more with kill -9 (three minutes)
	@mkdir -p "$(DIR)"
	$(BIN)/python examples/train_gpt.py --compare --offload "$(DIR)/demo"
	$(BIN)/python examples/resume.py "$(DIR)"

test: $(VENV)/.dev build/native/test_core  ## every test, and 400 fault plans (a few minutes)
	$(call plans,native,400)
	$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.dev  ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h tests/native/*.cpp tests/native/*.h

bench: $(VENV)/.dev  ## the benchmarks; DIR=/mnt/nvme chooses the drive
	@mkdir -p "$(DIR)"
	$(BIN)/python benchmarks/aio.py "$(DIR)"
	$(BIN)/python benchmarks/step.py "$(DIR)"
	$(BIN)/python benchmarks/step.py "$(DIR)" --half --contenders exact bf16 int8
	$(BIN)/python benchmarks/memory.py "$(DIR)"
	$(BIN)/python benchmarks/store.py "$(DIR)"
	$(BIN)/python benchmarks/codecs.py
	$(BIN)/python benchmarks/plan.py "$(DIR)"
	$(BIN)/python benchmarks/convergence.py

sanitize: build/address/test_core build/thread/test_core  ## the C++ core under ASan+UBSan and under TSan
	build/address/test_core build
	build/thread/test_core build

torture: build/address/test_core build/thread/test_core  ## 200 kills, 300 power losses, 10,000 fault plans (20 minutes)
	OFFLOAD_OPT_KILLS=$(KILLS) OFFLOAD_OPT_CUTS=$(CUTS) $(BIN)/python -m pytest tests/crash
	$(MAKE) --no-print-directory -j2 torture-address torture-thread
	OFFLOAD_OPT_EXAMPLES=$(RUNS) $(BIN)/python -m pytest tests/optim/test_state_machine.py

.PHONY: torture-address torture-thread
torture-address torture-thread: torture-%:
	$(call plans,$*,$(PLANS))

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
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCE)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.examples

# The native test driver, plain and with sanitizers.

build/address/test_core: FLAGS = -DCMAKE_BUILD_TYPE=Debug -DOFFLOAD_OPT_SANITIZE=address,undefined
build/thread/test_core: FLAGS = -DCMAKE_BUILD_TYPE=Debug -DOFFLOAD_OPT_SANITIZE=thread
build/%/test_core: $(VENV)/.dev $(wildcard tests/native/*) $(SOURCE)
	$(BIN)/cmake -S csrc -B build/$* -G Ninja -DCMAKE_MAKE_PROGRAM="$$(readlink -f $(BIN)/ninja)" \
	  -DOFFLOAD_OPT_PYTHON=OFF -DOFFLOAD_OPT_NATIVE_TESTS=ON $(FLAGS)
	$(BIN)/cmake --build build/$*

# $(call plans,BUILD,COUNT): plans 1 to COUNT, by a hundred. They wait more than they compute, so four run at once; all
# see the same faults each time, but never the same timing.
plans = seq 1 100 $(2) | xargs -P 4 -I FIRST build/$(1)/test_core build --plans FIRST 100
