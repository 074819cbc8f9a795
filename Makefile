# FedVision: `make` prints this help; `make demo` and `make test` set everything up themselves.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

help: ## print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@# opacus installs a top-level package "benchmarks" too: ours comes first
	echo 'import sys; sys.path.insert(0, "$(CURDIR)")' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fedvision-first.pth"
	touch $@

setup: $(VENV)/.installed ## create .venv with the pinned versions

demo: setup ## compare the FedILC paper's six strategies on embedded data, in small
	$(BIN)/fedvision bench fedilc --quick --out bench/demo

test: setup ## run all tests but those that bring up real silos
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not silos"

test-all: setup ## run all tests, those that bring up real silos too
	$(BIN)/python -m pytest -n 2 --dist loadfile

silos: setup ## run the quickstart on a coordinator and three silos with TLS, on this machine
	$(BIN)/fedvision deploy demo

image: ## make the containers' image with Debian's podman, as root; docker/podman.sh says with what
	docker/podman.sh

check: setup ## lint, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## measure the aggregation against reading its inputs once
	$(BIN)/python -m benchmarks.speed.aggregation

speed: setup ## measure our engines against a plain PyTorch loop and Flower's simulation (about an hour)
	$(BIN)/python -m benchmarks.speed

docs: setup ## make the tables and pictures of docs/ anew (six hours)
	$(BIN)/python -m benchmarks.figures_scenes
	$(BIN)/fedvision bench fedilc --out docs/results/fedilc
	$(BIN)/fedvision bench doublematch --out docs/results/doublematch
	$(BIN)/fedvision bench usi-ablations --out docs/results/usi
	$(BIN)/fedvision bench multimae-modalities --out docs/results/multimae/modalities
	$(BIN)/fedvision bench multimae-silos --out docs/results/multimae/silos
	$(BIN)/fedvision bench albef-objectives --out docs/results/albef/objectives
	$(BIN)/fedvision bench albef-silos --out docs/results/albef/silos
	$(BIN)/fedvision bench albef-tasks --out docs/results/albef/tasks
	$(BIN)/fedvision bench leopart-ablations --out docs/results/leopart/ablations
	$(BIN)/fedvision bench leopart-components --out docs/results/leopart/components
	$(BIN)/fedvision bench leopart-silos --out docs/results/leopart/silos

clean: ## remove what the tools cached; runs/ and bench/ stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

.PHONY: help setup demo test test-all silos image check bench speed docs clean
