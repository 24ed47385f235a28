# Shrinking the KV Cache: from a fresh clone to a built book (`make book`) and a green test run (`make test`).
# Every target sets up what it needs first; with everything in place that takes a tenth of a second.

PYTHON ?= python3
PORT ?= 8000
PAGE ?=
BIN := .venv/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python

# What a page is made from; and what all pages are made with, after a change of which none can be kept.
PAGES := $(wildcard CHANGELOG.md) $(shell find book -type f -not -name '.*' -not -path '*/.*' -not -path '*/__pycache__/*')
FRAME := _config.yml _toc.yml constraints.txt $(wildcard book/_ext/*.py book/_static/*.* book/_tools/vendor.json)
BUILT := _build/built

.DEFAULT_GOAL := help
.PHONY: help book serve test lint unit notebooks site outputs table bench colab constraints setup weights clean
.NOTPARALLEL:

help:
	@echo 'make book                     build the book, print the page to open'
	@echo 'make serve                    show it at http://127.0.0.1:$(PORT)/ (PORT=... for another)'
	@echo 'make test                     everything: lint, unit tests, notebooks, the book, the built site'
	@echo 'make lint|unit|notebooks|site one part of it'
	@echo 'make outputs                  run the notebooks again and store what they print'
	@echo 'make outputs PAGE=book/x.ipynb  one of them'
	@echo 'make table                    compute what is missing of the long table of chapter 4'
	@echo 'make bench                    measure speeds: decoding, calibration, conversion, imports, the book'
	@echo 'make colab                    run the chapters with the versions that Colab has'
	@echo 'make constraints              move the pinned versions to the newest allowed'
	@echo 'make clean                    remove what was built; remove .venv as well to start all over'

setup:
	@command -v $(PYTHON) >/dev/null || { echo 'There is no $(PYTHON) here: install Python 3.10 or newer' \
	  '(Debian, Ubuntu: apt install python3 python3-venv), or name one: make $(MAKECMDGOALS) PYTHON=...'; exit 1; }
	@$(PYTHON) book/_tools/setup_env.py

book: setup
	@$(MAKE) --no-print-directory $(BUILT)
	@echo 'The book is built. Open $(CURDIR)/_build/html/index.html, or run: make serve'

# Sphinx repeats a warning only for a page that it reads again. So a build that failed or was interrupted
# (no $(BUILT)) keeps nothing, and neither does one whose frame has changed.
$(BUILT): $(PAGES) $(FRAME)
	@for f in $(FRAME); do [ $(BUILT) -nt $$f ] || { rm -rf _build/html _build/.doctrees; break; }; done
	@rm -f $(BUILT)
	@echo 'Building the book: half a minute the first time.'
	@$(BIN)/jupyter-book build -q -W --keep-going -n . > _build/banner
	@touch $(BUILT)

serve: book
	@$(BIN)/python book/_tools/serve.py $(PORT)

test: lint unit notebooks site
	@echo 'All tests passed.'

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Half a minute, once: so that no test and no stored page tells of it.
weights: setup
	@$(BIN)/python -m kvteach.zoo > /dev/null

unit: weights
	$(RUN) -m pytest -q --ignore tests/site tests

notebooks: weights
	$(RUN) tests/strict.py $(PAGE)

site: book
	$(RUN) -m pytest -q tests/site

outputs: weights
	@$(RUN) book/_tools/refresh.py $(PAGE)

# Tens of minutes; it goes on where it was stopped.
table: weights
	@$(RUN) book/_tools/table.py

# Minutes, on a machine that does nothing else.
bench: weights
	@$(RUN) tests/benchmarks/run.py

colab: weights
	@$(BIN)/python book/_tools/colab.py

constraints: setup
	$(BIN)/pip install --quiet --upgrade --upgrade-strategy eager -r requirements.txt
	$(BIN)/python book/_tools/freeze.py

clean:
	rm -rf _build book/_static/vendor .pytest_cache .ruff_cache .hypothesis
