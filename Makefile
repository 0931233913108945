# Two commands: `make lab` to look, `make test` to check. Both set themselves up; a second call starts at once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
RUN    ?= runs/first
WORKERS ?= 2

.PHONY: lab test setup export widget-data gallery bench gpu clean help

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

lab: $(VENV)/.built  ## set up, run a first distillation, open JupyterLab (HEADLESS=1: stop after the report)
	@$(BIN)/kdlab distill --out $(RUN)
ifndef HEADLESS
	@$(BIN)/kdlab lab
endif

test: $(VENV)/.built  ## set up and run everything: unit tests, notebooks, browser checks
	@sh tests/browser/find_chromium.sh || [ -z "$$KDLAB_REQUIRE_BROWSER" ]
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

setup: $(VENV)/.built  ## make the virtual environment and build the extension

export: $(VENV)/.built  ## notebooks -> package, command-line table, README, table of losses; then clean the notebooks
	@$(BIN)/nbdev-export
	@$(BIN)/python -m kdlab.cli_export
	@$(BIN)/python docs/readme.py
	@$(BIN)/python docs/loss_table.py
	@$(BIN)/nbdev-clean

widget-data: $(VENV)/.built  ## make the runs that the widgets show (5 seeds, a few minutes)
	@$(BIN)/python -c "from kdlab import widget_data; print(widget_data.write())"

gallery: $(VENV)/.built  ## every widget as a page that opens from disk, in gallery/
	@$(BIN)/kdlab gallery

bench: $(VENV)/.built  ## time the kernels against eager PyTorch and torch.compile
	@$(BIN)/python benchmarks/soft_kl.py
	@$(BIN)/python benchmarks/linear.py
	@$(BIN)/python benchmarks/features.py
	@$(BIN)/python benchmarks/plain.py

gpu: $(VENV)/.built  ## on a machine with a GPU: test, sanitize and time the CUDA kernels
	@$(BIN)/python benchmarks/gpu.py

clean:           ## remove the environment, builds and runs
	rm -rf $(VENV) build dist *.egg-info runs gallery .browser kdlab/_C*.so

$(VENV)/.deps: constraints.txt settings.ini
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "kdlab needs Python 3.11 or later, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel pybind11
	@touch $@

# The extension needs no torch, so it is built while everything else is fetched; torch first, whose version the others must take.
$(VENV)/.built: $(VENV)/.deps setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	$(BIN)/python setup.py -q build_ext --inplace & building=$$!; \
	  $(PIP) torch==2.13.0 && KDLAB_EXT=0 $(PIP) --no-build-isolation -e '.[dev]'; installed=$$?; \
	  wait $$building && exit $$installed
	@touch $@
