# make demo    install what is missing, then run the whole job on the embedded world
# make test    the same, then the tests (PYTEST_ARGS="-k segment" narrows them)
# make test-all  the same with the long ones too
# make test-4bit  those of a base in 4 bits, with bitsandbytes installed
# make lint    ruff and mypy
# make docs    the documentation's site in build/site, with every link checked
#
# PYTHON=python3.12 chooses the interpreter of a new .venv; FGAIF_DEVICE=cpu|gpu overrides the
# detection of a GPU. Nothing is installed twice, and every target can be interrupted and repeated.

export PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin

.PHONY: demo test test-all test-4bit lint docs format install clean

demo: install
	$(BIN)/fgaif demo

test: install
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-all: PYTEST_ARGS += -m ""
test-all: test

test-4bit: install
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[quantize]'
	$(BIN)/pytest tests/test_quantized.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/draw_house.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install:
	@.ci/install

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
