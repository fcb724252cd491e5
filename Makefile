# make demo    insert a subject into a photo; says where the picture is
# make test    the test suite
# make bench   the benchmarks, and their table
# make lint    ruff and pyright
# make sanitize    the CPU library's tests under AddressSanitizer and UndefinedBehaviorSanitizer
#
# Each sets up .venv first. Variables: PYTHON, VENV, TORCH, PYTEST_ARGS, PYTEST_WORKERS, DEMO.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO ?= demo
# One thread each: two processes that both use every core slow each other many times over.
PYTEST_WORKERS ?= -n 2 --dist loadfile
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# A torch that the machine already has, built for its GPU say, is kept.
HAS_TORCH := "import importlib.metadata as m; assert tuple(map(int, m.version('torch').split('.')[:2])) >= (2, 11)"
SANITIZERS := $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libstdc++.so.6)

.PHONY: demo test bench lint sanitize clean
.DEFAULT_GOAL := demo

$(STAMP): setup.py pyproject.toml $(wildcard csrc/cpu/*)
	if $(PYTHON) -c $(HAS_TORCH) 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi
	$(PY) -m pip install -q --upgrade pip "setuptools>=77"
	$(PY) -c $(HAS_TORCH) 2>/dev/null || $(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q --no-build-isolation -e ".[all,dev]"
	touch $@

demo: $(STAMP)
	$(PY) -m flashbrush demo -o $(DEMO)

test: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest tests -q $(PYTEST_WORKERS) $(PYTEST_ARGS)

bench: $(STAMP)
	$(PY) -m pytest benchmarks --benchmark-only
	$(PY) -m flashbrush bench

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)

# The library of every other target comes back whatever the tests say.
sanitize: $(STAMP)
	trap '$(PY) setup.py -q build_ext --inplace' EXIT; \
	FLASHBRUSH_SANITIZE=1 $(PY) setup.py -q build_ext --inplace && \
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 $(PY) -m pytest tests/bindings -q -k cpu $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist demo flashbrush.egg-info .benchmarks .pytest_cache .ruff_cache
	rm -f bindings/backends/libflashbrush_cpu.so bindings/backends/build_report.json
	find . -name __pycache__ -prune -exec rm -rf {} +
