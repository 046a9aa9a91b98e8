# `make demo` and `make test` make their own virtual environment at the first call; later calls install nothing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# Wheels are not compiled to bytecode at install: Python does it for the modules that are imported.
PIP = $(VENV)/bin/pip install --quiet --no-compile --disable-pip-version-check
RUN = $(VENV)/bin/python
# One thread each for as many test processes as there are JOBS: PyTorch's threads on tiny models cost more than they gain.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile

.PHONY: demo test test-full lint docs clean

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(VENV)/bin/python pyproject.toml requirements.lock requirements-embedded.txt
	$(PIP) -c requirements.lock -e '.[embedded]'
	$(PIP) --no-deps -r requirements-embedded.txt
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -c requirements.lock -e '.[embedded,train,ray,apps,docs,dev]'
	@touch $@

# Six photographs, three methods, three scales: about three minutes on two cores, and a few more for the first install.
demo: $(VENV)/.base
	$(RUN) evaluate.py -m profile=embedded scale=4,16,64 method=nn,direct,coz_null at=sample 'dataset.names=[cat,astronaut,clock,nuthatch,dogs,fig]'

test: $(VENV)/.test
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PYTEST)

# The slow ones as well, and what needs a GPU or real weights where they are there; each skip says what it misses.
test-full: $(VENV)/.test
	$(PYTEST) -m "slow or not slow" -rs

# The documentation as a site: open site/index.html, or, for its search, `python -m http.server -d site`.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) build *.egg-info
