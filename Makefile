# `make demo` and `make test` start from a bare clone: they create .venv, install, and run. Only Python and make are needed.

SHELL = /bin/sh
BIN = .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The tests' models are tiny: on several threads they take longer, and on a busy machine many times as long.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help demo test test-slow bench format clean

help:
	@echo "make demo       install Bridle into .venv and show it working"
	@echo "make test       install it with its checks and run them: lint, format, types, tests"
	@echo "make test-slow  the tests that take minutes or need the package index"
	@echo "make bench      measure speed against diffusers; 22 GB of memory, an hour; docs/performance.md"
	@echo "make format     put the code into its form"
	@echo "make clean      remove what checks and builds left behind; .venv stays"

demo: .venv/.installed
	@$(BIN)/bridle demo

test: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python .venv
	$(PYTEST)

test-slow: .venv/.installed-dev
	@$(BIN)/python -c "import ray" 2>/dev/null || { $(INSTALL) ".[dev,cluster]" "Ray"; }
	$(PYTEST) -m slow

# One thread, and sides that take turns: on a shared machine ratios mean something, seconds do not.
bench: .venv/.installed-dev
	mkdir -p work/bench
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step.py --size embedded --batch 24 --no-encode --rounds 15 --json work/bench/step-embedded.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step.py --size embedded --batch 24 --rounds 9 --json work/bench/step-embedded-encode.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step.py --size embedded --batch 24 --no-encode --precision fp32 --rounds 9 --json work/bench/step-embedded-fp32.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step.py --size sd15 --latents 32 --json work/bench/step-sd15.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step.py --size sd15 --latents 64 --rounds 11 --json work/bench/step-sd15-64.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/parts.py --size embedded --batch 24 --json work/bench/parts-embedded.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/parts.py --size sd15 --latents 32 --json work/bench/parts-sd15.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/phases.py --size embedded --batch 24 --json work/bench/phases-embedded.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loops.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gradients.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sampling.py requests --batch 8 --steps 10 --rounds 3 --json work/bench/requests.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sampling.py embedded --batch 8 --steps 20 --json work/bench/sampling-embedded.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sampling.py embedded --batch 8 --steps 20 --precision fp32 --json work/bench/sampling-embedded-fp32.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/encode.py --size sd15 --size-px 512 --rounds 3 --json work/bench/encode.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sampling.py sd15-256 --steps 10 --rounds 5 --json work/bench/sampling-sd15.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sampling.py sd15-512 --steps 4 --rounds 3 --json work/bench/sampling-sd15-512.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/growth.py --json work/bench/growth.json --plot work/bench/growth.png
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/start.py --rounds 9 --json work/bench/start.json

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .pytest_cache .ruff_cache
	find src tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Says what is fetched and how big it is, in place of pip's hundreds of lines; pip's errors come through as they are.
# The loop's exit status is the pipeline's, so a failed pip fails the rule in a plain sh too.
INSTALL = install() { \
	echo "Installing $$2 into .venv: once, one to two minutes and about 1.5 GB on disk (PyTorch is most of it)."; \
	{ $(BIN)/python -m pip install --progress-bar off -c constraints.txt -e "$$1" || echo "failed"; } | \
	while read -r word rest; do case "$$word $$rest" in \
		Downloading*MB\)) echo "  fetching $$rest" ;; \
		Installing\ collected*) echo "  unpacking" ;; \
		failed*) echo "The installation failed; pip says why above." >&2; exit 1 ;; \
	esac; done; }; install

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@$(INSTALL) "." "Bridle"
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@$(INSTALL) ".[dev]" "Bridle and its checks"
	@touch .venv/.installed $@

# pip comes last into a new environment, so its presence tells a whole one from one that broke off half-way.
# The default python3 goes first; a candidate is run, because a name on the path may be a shim that leads nowhere.
$(BIN)/pip:
	@for python in python3 python3.13 python3.12 python3.11; do \
		if "$$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then \
			echo "Creating .venv with $$("$$python" --version)."; \
			exec "$$python" -m venv .venv; \
		fi; \
	done; \
	echo "Bridle needs Python 3.11 or newer; python3 is $$(python3 --version 2>&1). Install it and run make again." >&2; \
	exit 1
