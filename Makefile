# Two commands do everything on a fresh machine with Python 3.11:
#   make demo    environment, installation, one reconstruction, and where to look at it
#   make test    environment, installation, every library notebook executed as a test, pytest
# and one is for those who change notebooks:
#   make notebooks    run the library notebooks again and keep their outputs
# and one for those who read:
#   make docs    README, all notebooks and the results as one book, _book/html/index.html
# Another interpreter: make demo PYTHON=python3.12. Another place for the environment: VENV=somewhere.

PYTHON ?= python3.11
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: demo test notebooks docs
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(BIN)/papermill nbs/reconstruct.ipynb -p subject phantom-7
	@echo
	@echo "Done. Look at results/phantom-7/: reconstruct.ipynb (the story, with its figures), figures/ (the same as PNG),"
	@echo "volume.nii.gz (the heart, for any NIfTI viewer), summary.json (how it was made, and its scores)."

# Two notebooks at a time, then two tests at a time, each on one thread: threads that share a core wait for one another.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The outputs are deterministic (timings come from results/record/), so this leaves no difference where nothing changed.
LIBRARY = $(notdir $(wildcard nbs/[0-9]*.ipynb)) index.ipynb
notebooks: $(VENV)/.installed-dev
	cd nbs && OMP_NUM_THREADS=1 $(abspath $(BIN))/jupyter nbconvert --to notebook --inplace --execute --coalesce-streams \
	    --ExecutePreprocessor.timeout=1800 --ExecutePreprocessor.store_widget_state=False $(LIBRARY)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

# Nothing is executed: the book shows the outputs that were committed. A link that leads nowhere is an error.
docs: $(VENV)/.installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -M html . _book -c docs -W --keep-going -q
	@echo "Done. Open _book/html/index.html; no network is needed."

# The stamps say that the environment is there; a change of what is installed makes them stale.
PACKAGING = settings.ini setup.py pyproject.toml constraints.txt

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(PACKAGING)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(PACKAGING)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(VENV)/.created $(PACKAGING)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@ $(VENV)/.installed
