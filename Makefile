# The book and its package. `make` alone says what there is.
PYTHON ?= python3
PORT ?= 8000
DIR ?= nbs
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
PY := $(BIN)/python
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help book pdf test faults lab student serve pages bench model clean

help:        ## this list
	@echo "make book    build the book into _build/html (without a warning, from the stored outputs)"
	@echo "make pdf     print the book into _build/llmbook.pdf (needs Chromium; takes minutes)"
	@echo "make test    prove everything: export, clean, every page, every stored output, tests/"
	@echo "make faults  kill trainings fifty times, resume each, and spoil checkpoints in thousands of ways (takes minutes)"
	@echo "make serve   open the built book in a browser"
	@echo "make lab     open the pages in JupyterLab (DIR=_build/student for the student edition)"
	@echo "make pages   run the pages and store their outputs (PAGE=03_bpe for one)"
	@echo "make student write the pages without their solutions, to work in; what you have worked in is kept"
	@echo "make bench   measure tokenizer, data, generation and pretraining beside their peers, each in one run"
	@echo "make model   train the small model that the package ships, anew (about two minutes)"
	@echo "make clean   remove what was built; .venv and the student edition stay"
	@echo "PYTHON=python3.12 chooses the Python that .venv is made from."

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f'Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; try: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt setuptools wheel
	$(PY) -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	@$(PY) -c "open('$(READY)', 'w').close()"

book: $(READY)
	$(PY) -m tools.book

pdf: book
	$(PY) -m tools.pdf

test: $(READY)
	$(PY) -m pytest -n 2

faults: $(READY)
	$(PY) tests/faults.py

serve: $(READY)
	@test -d _build/html || $(MAKE) book
	$(PY) -m tools.serve $(PORT)

lab: $(READY)
	$(PY) -m jupyterlab $(DIR)

student: $(READY)
	$(PY) -m tools.student

pages: $(READY)
	$(PY) -m tools.pages $(PAGE)

bench: $(READY)
	$(PY) benchmarks/bpe.py
	$(PY) benchmarks/data.py
	$(PY) benchmarks/generate.py
	$(PY) benchmarks/pretrain.py

model: $(READY)
	$(PY) -m tools.make_model

clean:
	$(PYTHON) -c "import shutil; from pathlib import Path; [shutil.rmtree(d, ignore_errors=True) for d in (*(p for p in Path('_build').glob('*') if p.name != 'student'), 'build', 'dist', 'llmbook.egg-info', '.pytest_cache', '.hypothesis')]"
