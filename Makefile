# Everything below sets itself up: only python3, make and git are needed.
#
#   make demo      pictures of the main job in outputs/
#   make test      the whole test suite
#   make style     fix and format       make quality   the same, check only
#   make docs      the documentation in site/
#   make space     a folder that runs as a Hugging Face Space: make space SPACE=folder

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SPACE ?= outputs/space
SETUP_FILES := pyproject.toml constraints.txt

DEMO_ARGS ?= "a red cat and a blue car" \
	--region "a red cat@0,0,0.5,1" --region "a blue car@0.5,0,1,1" \
	--model builtin:icons-t2i --seed 0 --steps 24 --num-images 4 --batch-size 4 \
	--max-sequence-length 1 --compare --name demo --output outputs

.DEFAULT_GOAL := help
.PHONY: help demo test style quality docs space clean

help:
	@sed -n 's/^#   //p' Makefile

# Stamps are written last: an interrupted installation is taken up again, a finished one costs nothing.
$(VENV)/.created:
	@command -v "$(PYTHON)" > /dev/null || { echo "$(PYTHON) was not found; give one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "attnctrl needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)" >&2; \
		echo "HINT: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	@touch "$@"

$(VENV)/.installed: $(VENV)/.created $(SETUP_FILES)
	@echo "Installing attnctrl into $(VENV) (a few minutes the first time)"
	$(PIP) -e .
	@touch "$@"

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need into $(VENV)"
	$(PIP) -e '.[test]'
	@touch "$@"

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	@touch "$@"

demo: $(VENV)/.installed
	$(BIN)/attnctrl generate $(DEMO_ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

style: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

space: $(VENV)/.created
	$(BIN)/python apps/space/write.py "$(SPACE)"

clean:
	rm -rf "$(VENV)" site outputs
