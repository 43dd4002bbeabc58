# guestfault: `make run` and `make test` work on a machine that has python3 and its venv module.
# Nothing is installed outside $(VENV); nothing needs root.

PYTHON ?= python3
VENV := .venv
bin := $(VENV)/bin
pip_install := $(bin)/python -m pip install --quiet --disable-pip-version-check --editable

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help run test lint format clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

run: $(VENV)/.run ## run a guest on the software KVM and bring its absent pages in
	@$(bin)/guestfault run --kvm soft

test: $(VENV)/.dev ## run the tests
	@$(bin)/pytest

lint: $(VENV)/.dev ## check format, style and types
	@$(bin)/ruff format --check
	@$(bin)/ruff check
	@$(bin)/mypy

format: $(VENV)/.dev ## rewrite the sources in the project's format
	@$(bin)/ruff format
	@$(bin)/ruff check --fix

clean: ## remove the virtual environment and everything generated
	@rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# An environment whose interpreter is gone (the system's python was replaced) is built again.
$(shell test -x $(bin)/python || rm -f $(VENV)/.run $(VENV)/.dev)

$(bin)/python:
	$(require-python)
	@echo "Creating the virtual environment $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)

# What `run` needs, and that plus what the tests and the linters need.
$(VENV)/.run: pyproject.toml | $(bin)/python
	@echo "Installing guestfault into $(VENV)"
	@$(pip_install) .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(bin)/python
	@echo "Installing guestfault and its development tools into $(VENV)"
	@$(pip_install) '.[dev]'
	@touch $(VENV)/.run $@

# Stops with the one line that says what to install, if there is one to say.
define require-python
$(eval problem := $(shell sh scripts/python-problem.sh '$(PYTHON)'))$(if $(problem),$(error $(problem)))
endef
