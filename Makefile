# make .venv | make demo | make test : all a newcomer needs. Python 3.11+, git and make must be there, nothing else.

PYTHON ?= python3
BIN    := .venv/bin
UV     := uv==0.13.9

# Containers like to set it. Each of our many processes would then compile all that it imports again: 6.5 s of processor
# time for nestgen.training.train, which takes 3.4 s from bytecode that is kept.
export PYTHONDONTWRITEBYTECODE :=

# One recipe of pipelines/recipes, or all of its jobs in minutes on scenes: docs/workflow.md. ARGS go to snakemake.
EXPERIMENT = $(BIN)/python pipelines/run.py

.PHONY: help demo run rehearse test lowest lint style types clean
.DELETE_ON_ERROR:

help:
	@echo "make demo                    scenes, features, three levels, samples, report: minutes on two cores"
	@echo "make run RECIPE=NAME         a recipe of pipelines/recipes; CONFIG='source=imagenet:DIR gpus=1', ARGS=-n lists its jobs"
	@echo "make rehearse RECIPE=NAME    all of its jobs on a small scale"
	@echo "make test                    every test, with lint and types; make lint alone"
	@echo "make lowest                  both packages with the lowest versions that they allow"
	@echo "make .venv, make clean       the environment; remove what demo and rehearsals wrote"
	@echo "Recipes:" $(sort $(basename $(notdir $(wildcard pipelines/recipes/*.yaml))))

.venv: pyproject.toml packages/featurize/pyproject.toml packages/nestgen/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(UV)'
	$(BIN)/uv sync --inexact --quiet
	touch .venv

demo: .venv
	@$(EXPERIMENT) pipelines/recipes/demo.yaml --directory demo $(ARGS) $(if $(CONFIG),--config $(CONFIG))

run: .venv
	@$(EXPERIMENT) 'pipelines/recipes/$(RECIPE).yaml' --directory 'experiments/$(RECIPE)' $(ARGS) $(if $(CONFIG),--config $(CONFIG))

rehearse: .venv
	@$(EXPERIMENT) 'pipelines/recipes/$(RECIPE).yaml' --directory 'rehearsals/$(RECIPE)' $(ARGS) --config rehearse=1 $(CONFIG)

lint: style types

style: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv
	$(BIN)/mypy

# One thread a process: two test processes that both spin on two cores are ten times slower.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

# Runs both packages with the lowest versions that they allow. uv keeps its downloads (torch alone takes gigabytes), so the
# environment is made again in seconds. Without --no-config the workspace's exact versions would apply.
lowest: build/lowest/complete
	OMP_NUM_THREADS=1 build/lowest/bin/python .ci/smoke.py

build/lowest/complete: packages/featurize/pyproject.toml packages/nestgen/pyproject.toml | .venv
	$(BIN)/uv venv --no-config --clear --quiet --python $(BIN)/python build/lowest
	$(BIN)/uv pip install --no-config --quiet --resolution lowest-direct --python build/lowest/bin/python \
		--editable packages/featurize --editable packages/nestgen
	touch $@

clean:
	rm -rf demo rehearsals .snakemake
