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
.PHONY: help book draft pdf test faults lab student serve pages peers bench bench-full model clean

help:        ## this list
	@echo "make book    build the book into _build/html (without a warning, from the stored outputs)"
	@echo "make draft   build only the pages that have changed since, in seconds and without the checks"
	@echo "make pdf     print the book into _build/llmbook.pdf (needs Chromium; takes minutes)"
	@echo "make test    prove everything: export, clean, every page, every stored output, tests/"
	@echo "make faults  kill trainings fifty times, resume each, and spoil checkpoints in thousands of ways (takes minutes)"
	@echo "make serve   open the built book in a browser"
	@echo "make lab     open the pages in JupyterLab (DIR=_build/student for the student edition)"
	@echo "make pages   run the pages and store their outputs (PAGE=03_bpe for one)"
	@echo "make student write the pages without their solutions, to work in; what you have worked in is kept"
	@echo "make bench   measure tokenizer, data, training and generation beside their peers, in one run of minutes"
	@echo "make bench-full  measure all, with more rounds, and how cost grows (takes much longer; NANOGPT=folder adds a checkout of nanoGPT)"
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

draft: $(READY)
	$(PY) -m tools.book --changed

pdf: book
	$(PY) -m tools.pdf

test: $(READY)
	$(PY) -m pytest -n 3

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

peers: $(READY)
	$(PY) -m pip install --quiet --no-deps -r benchmarks/requirements.txt

bench: peers
	$(PY) -m benchmarks

bench-full: peers
	$(PY) -m benchmarks --full

model: $(READY)
	$(PY) -m tools.make_model

clean:
	$(PYTHON) -c "import shutil; from pathlib import Path; [shutil.rmtree(d, ignore_errors=True) for d in (*(p for p in Path('_build').glob('*') if p.name != 'student'), 'build', 'dist', 'llmbook.egg-info', '.pytest_cache', '.hypothesis')]"
