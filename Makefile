# make demo    insert a subject into a photo; says where the picture is
# make test    the tests that are not marked slow; property tests draw a quarter of their examples
# make test-all    every test with every example
# make bench   the benchmarks, and their table
# make lint    ruff, clang-format and pyright
# make docs    the documentation site, into build/site; a broken link or an undocumented public name fails
# make wheels  a wheel and a source distribution, into dist
# make sanitize    the CPU library's tests under AddressSanitizer and UndefinedBehaviorSanitizer
#
# make install    .venv with the package and its development tools, which every target above sets up first
#
# Variables: PYTHON, VENV, TORCH, PYTEST_MARKS, PYTEST_ARGS, PYTEST_WORKERS, SANITIZED, DEMO.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CPU_WHEELS ?= https://download.pytorch.org/whl/cpu
DEMO ?= demo
# One thread each: two processes that both use every core slow each other many times over.
PYTEST_WORKERS ?= -n 2 --dist worksteal
PYTEST_MARKS ?= not slow
PYTEST_ARGS ?=
SANITIZED ?= tests/bindings -k "cpu or norm_rope or column_mass"

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
STAMP := $(VENV)/installed.txt
CONSTRAINTS := $(VENV)/constraints.txt
# A torch that the machine already has, built for its GPU say, is kept.
HAS_TORCH := "import importlib.metadata as m; assert tuple(map(int, m.version('torch').split('.')[:2])) >= (2, 11)"
TORCH_VERSION := "import importlib.metadata as m; print('torch==' + m.version('torch'))"
SANITIZERS = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libstdc++.so.6)

.PHONY: install demo test test-all bench lint docs wheels sanitize clean
.DEFAULT_GOAL := demo

# Debian's Python has no venv with pip in it before python3-venv is installed; the next two ways need only its pip.
$(PY):
	site=$$($(PYTHON) -c $(HAS_TORCH) 2>/dev/null && echo --system-site-packages); \
	$(PYTHON) -m venv --clear $$site $(VENV) \
	|| $(PYTHON) -m virtualenv -q --clear $$site $(VENV) \
	|| { $(PYTHON) -m venv --clear --without-pip $$site $(VENV) && $(PYTHON) -m pip --python $(PY) install -q pip; } \
	|| { rm -rf $(VENV); echo "$(PYTHON) makes no virtual environment: install python3-venv or virtualenv" >&2; exit 1; }

# Without an NVIDIA driver the CPU's torch, from the configured indexes or PyTorch's own: the other one brings gigabytes
# of CUDA libraries along. The constraint keeps what is installed after it from exchanging it.
$(STAMP): setup.py pyproject.toml $(wildcard csrc/*/* csrc/*/*/*) | $(PY)
	$(PIP) --upgrade pip "setuptools>=77"
	$(PY) -c $(HAS_TORCH) 2>/dev/null \
	|| { test "$$(uname)" = Linux && ! command -v nvidia-smi >/dev/null && { $(PIP) "$(TORCH)+cpu" 2>/dev/null \
		|| $(PIP) --retries 1 --timeout 15 --index-url $(CPU_WHEELS) "$(TORCH)"; }; } \
	|| $(PIP) "$(TORCH)"
	$(PY) -c $(TORCH_VERSION) > $(CONSTRAINTS)
	$(PIP) --no-build-isolation -c $(CONSTRAINTS) -e ".[all,dev]"
	$(PY) -m pip freeze --exclude-editable > $@

install: $(STAMP)

demo: $(STAMP)
	$(PY) -m flashbrush demo -o $(DEMO)

PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest tests -q $(PYTEST_WORKERS)

test: $(STAMP)
	$(PYTEST) -m "$(PYTEST_MARKS)" $(PYTEST_ARGS)

test-all: $(STAMP)
	FLASHBRUSH_TEST_PERCENT=100 $(PYTEST) $(PYTEST_ARGS)

bench: $(STAMP)
	$(PY) -m pytest benchmarks --benchmark-only
	$(PY) -m flashbrush bench

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(PY) -m pyright -p pyproject.toml --pythonpath $(PY)

# Nothing is downloaded. The variable keeps a notice about mkdocs' successors off the screen.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "the documentation is in build/site/index.html"

wheels: | $(PY)
	$(PIP) build
	$(PY) -m build

# The library of every other target comes back whatever the tests say. Leaks are left out: the interpreter has thousands.
# A report goes to standard error just before the process ends: pytest must not hold it.
sanitize: $(STAMP)
	trap '$(PY) setup.py -q build_ext --inplace' EXIT; \
	CXX=g++ FLASHBRUSH_SANITIZE=1 $(PY) setup.py -q build_ext --inplace && \
	FLASHBRUSH_TEST_PERCENT=5 OMP_NUM_THREADS=2 LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(PY) -m pytest $(SANITIZED) -q --capture=sys $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist demo flashbrush.egg-info .benchmarks .pytest_cache .ruff_cache
	rm -f bindings/backends/libflashbrush_*.so bindings/backends/build_report.json
	find . -name __pycache__ -prune -exec rm -rf {} +
