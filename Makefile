# make demo    see it work
# make test    everything that is tested
# Both make .venv and compile first.

PYTHON ?= python3
VENV ?= .venv
SOURCES := pyproject.toml setup.py $(wildcard pgauthproxy/*.pyx pgauthproxy/*.pxd)

.PHONY: demo test lint dist clean

demo: $(VENV)/demo.stamp
	$(VENV)/bin/pgauthproxy demo

# What fails beside others is tried once more, alone: a fault of the program fails twice, a machine that was too busy
# for a time-out does not.
test: $(VENV)/test.stamp
	$(VENV)/bin/pytest -q -n 2 || { [ $$? = 1 ] && $(VENV)/bin/pytest -q --last-failed; }

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	PATH="$(VENV)/bin:$$PATH" cython-lint pgauthproxy

dist: $(VENV)/test.stamp
	$(VENV)/bin/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info pgauthproxy/*.so pgauthproxy/*.c pgauthproxy/*.html

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(SOURCES) | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/test.stamp: $(SOURCES) | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable '.[test,lint]'
	touch $@
