# marnet: `make demo` runs the whole job on this machine, `make test` proves that it works.
#
# Needs python3 (3.11 or newer) and make. Everything is installed into ./.venv.
# PyPI's torch brings gigabytes of CUDA libraries. On a machine without a GPU, take the CPU build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
DATA ?= digits
SEED ?= 0
# The folder of a data set that is read and not made, and what it is: make demo DATA=grocery SOURCE=DIR
SOURCE ?=
SOURCE_grocery := a checkout of the Grocery Store data set: git clone https://github.com/marcusklasson/GroceryStoreDataset
SOURCE_vireofood172 := the folder with ready_chinese_food and SplitAndIngreLabel of VireoFood-172; see docs/data.md
SOURCE_ingredients101 := the folder with food-101 and Ingredients101; see docs/data.md
# Two thirds of the plates are classified right, so many answers are close calls, and fp16 turns one
# or two of the 512 that are compared: less than 99.9 % agreement, the default of marnet-export.
EXPORT_plates := --min-agreement 0.99
EXPORT_grocery := --min-agreement 0.99
EXPORT_vireofood172 := --min-agreement 0.99
EXPORT_ingredients101 := --min-agreement 0.99
# The recipe for the groceries starts from pretrained encoders, which this command writes.
ENCODERS_grocery = $(BIN)/marnet-train encoders --out encoders --force

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help setup source demo test test-all test-timm lint format readme cubins native gpu clean

help:
	@echo "make demo    set up, then train, export, classify and measure on $(DATA)"
	@echo "             DATA=plates; with SOURCE=DIR: DATA=grocery, vireofood172 or ingredients101"
	@echo "make test    set up, then run the quick test suite"
	@echo "make test-all  all tests but those of an hour; COVERAGE=1: and tell which lines they ran"
	@echo "make test-timm  the tests of encoders of timm, in an environment of their own, .venv-timm"
	@echo "make lint    ruff and pyright"
	@echo "make readme  run the README's main job and write what it prints into the page"
	@echo "make docs    build the pages and the API reference into ./site"
	@echo "make cubins  compile the CUDA kernels that a wheel ships; before building one"
	@echo "make native  compile the loop for CPUs that a wheel ships; before building one"
	@echo "make gpu     on a machine with a GPU: its tests and all speeds, into OUT=FOLDER"
	@echo "make setup   the shared first step: .venv with this package in it"
	@echo "make clean   remove .venv and everything that demo wrote"

setup: .venv/.installed

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "marnet needs Python 3.11 or newer; name one with: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "this python3 cannot make virtual environments; on Debian and Ubuntu run:"; \
	       echo "  sudo apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/.torch: .venv/.created constraints.txt
	$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml
	$(PIP) --editable ".[all]"
	@touch $@

.venv/.dev: .venv/.installed
	$(PIP) --editable ".[dev]"
	@touch $@

source:
	@[ -z "$(SOURCE_$(DATA))" ] || [ -d "$(SOURCE)" ] \
	  || { echo "DATA=$(DATA) needs SOURCE=DIR, $(SOURCE_$(DATA))"; \
	       echo "then run: make demo DATA=$(DATA) SOURCE=DIR"; exit 1; }

demo: source setup
	$(BIN)/marnet-train data $(DATA) $(if $(SOURCE_$(DATA)),--source "$(SOURCE)") --out data/$(DATA) --force
	$(ENCODERS_$(DATA))
	$(BIN)/marnet-train fit --data data/$(DATA) --recipe $(DATA) --out runs/$(DATA) --seed $(SEED) --force
	$(BIN)/marnet-export --precision fp16 $(EXPORT_$(DATA))
	$(BIN)/marnet-classify $$(ls data/$(DATA)/test/*.*g | head -5)
	$(BIN)/marnet-bench --batch 64

PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: .venv/.dev
	$(PYTEST)

test-all: .venv/.dev
	$(PYTEST) -m "not hour" --hypothesis-profile all $(if $(COVERAGE),--cov --cov-report=term:skip-covered)

# torchvision does not import beside the CPU build of torch. So this environment has a torch of its own
# that fits, and behind it on the path whatever .venv has.
TIMM_VENV ?= .venv-timm
TIMM_PIP = $(TIMM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
$(TIMM_VENV)/.installed: .venv/.dev
	$(BIN)/python -m venv --clear $(TIMM_VENV)
	$(TIMM_PIP) torch==2.14.1 torchvision==0.29.1
	$(TIMM_PIP) --no-deps timm==1.0.29 pyyaml
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE)')')" \
	  > "$$($(TIMM_VENV)/bin/python -c '$(SITE)')/marnet.pth"
	@touch $@

test-timm: $(TIMM_VENV)/.installed
	$(TIMM_VENV)/bin/python -m pytest --numprocesses auto --dist worksteal tests/with_timm

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

readme: .venv/.dev
	$(BIN)/python tests/readme.py

.PHONY: docs
.venv/.docs: .venv/.created pyproject.toml constraints.txt
	$(PIP) --editable ".[docs]"
	@touch $@

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# In twelve minutes, not counting the set-up. DRY_RUN=1 walks the plan on a machine without a GPU.
OUT ?= benchmarks/results/gpu
gpu: .venv/.dev
	$(BIN)/python benchmarks/gpu_run.py --output "$(OUT)" $(if $(DRY_RUN),--dry-run)

cubins: .venv/.dev
	$(BIN)/python -m marnet_kernels.ship

native: .venv/.installed
	$(BIN)/python -m marnet_kernels.native

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-timm data encoders runs bundles
