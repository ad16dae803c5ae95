# Needs Python 3.10+ (constraints.txt is for 3.11 and newer) and make; everything else goes into .venv.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= out
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off
# Two processes, which every machine has cores for. On a machine with many: ARGS="-n auto"; without others: ARGS=.
ARGS   ?= -n 2
PYTEST := $(BIN)/python -m pytest $(ARGS)
SHADOW := build/shadow
STUBS  := build/stubs
VIDEOS := edgetube/demo/videos
MODULES ?= calibration bench/temporal.py edgetube/bundle.py
SAMPLE ?= 10
SEED   ?= 0

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-long test-all test-machines test-gpu mutants lint shadow bench wheel clean

help: ## this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## export the built-in model for every runtime that is here, watch four clips, report on all
	$(BIN)/edgetube targets
	$(BIN)/edgetube export --target all --out $(OUT)
	$(BIN)/edgetube run $(OUT)/demo.onnx-int8 "$(VIDEOS)/*.mp4"
	$(BIN)/edgetube inspect $(OUT)/demo.onnx-fp32 --plot $(OUT)/tubes.png
	$(BIN)/edgetube report $(OUT) --clips 504

test: lint ## checks, then the tests that are quick
	$(PYTEST) -m "not (slow or long or gpu or machines)"

# A file's tests stay in one process: they share what is exported, and the system that another processor runs.
test-slow: $(VENV)/dev.stamp ## the tests that take longer
	$(PYTEST) --dist loadfile -m "slow and not (long or machines or gpu)"

test-long: $(VENV)/dev.stamp ## those that CI has no time for
	$(PYTEST) -m "long and not gpu"

test-machines: $(VENV)/dev.stamp ## the product on other processors (QEMU), in other Pythons' plain installs, on filmed videos
	$(PYTEST) --dist loadfile -m "machines and not long" tests/machines

test-all: test test-slow test-machines test-long ## all of them

test-gpu: $(VENV)/dev.stamp ## the tests that need an NVIDIA GPU; without one each says why it was skipped
	$(BIN)/python -m pytest -m gpu

mutants: $(VENV)/mutants.stamp ## plant faults at random in MODULES, SAMPLE in each: do the quick tests find them?
	$(BIN)/python .ci/mutants.py --sample $(SAMPLE) --seed $(SEED) $(MODULES)

lint: $(VENV)/dev.stamp shadow $(STUBS)/stamp ## format, style, types, and who imports whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	cd $(SHADOW) && "$(abspath $(BIN))/lint-imports" --config "$(CURDIR)/.importlinter" --no-logo --cache-dir "$(CURDIR)/.import_linter_cache"
	cp -R bench/studies $(SHADOW)/edgetube/bench/  # scripts of the repository, which are not in the wheel
	cp -R tests $(SHADOW)/
	cd $(SHADOW) && "$(abspath $(BIN))/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache"

# The modules of the wheel where they are installed, export/ inside edgetube/ and so on: neither mypy nor import-linter
# can be told of such a mapping.
shadow: $(VENV)/dev.stamp
	@rm -rf $(SHADOW)
	@$(BIN)/python -c "import setuptools; setuptools.setup()" --quiet build_py --build-lib $(SHADOW)

# TensorRT's types, without TensorRT. As published they hold a Python keyword as a parameter and a default before none.
$(STUBS)/stamp: $(VENV)/dev.stamp
	@$(PIP) --no-deps --upgrade --target $(STUBS) tensorrt-stubs==10.13.0.35.1
	@sed -i.bak -E 's/([( ])in: list/\1in_: list/; s/(power: Weights = None, channel_axis: int)\)/\1 = ...)/' \
		$(STUBS)/tensorrt_bindings/tensorrt.pyi
	@touch $@

# A Triton server with its Python backend, for one test; its package asks for a NumPy that edgetube's do not.
build/triton/stamp: $(VENV)/dev.stamp
	@$(PIP) --no-deps --upgrade --target $(@D) nvidia-pytriton==0.7.0
	@touch $@

bench: $(VENV)/dev.stamp ## the timings of docs/benchmarks.md; wants a quiet machine
	$(BIN)/python bench/studies/tokenizer.py --json bench/results/tokenizer.json
	$(BIN)/python bench/studies/static_vs_conv3d.py --json bench/results/static_vs_conv3d.json

wheel: $(VENV)/dev.stamp ## sdist and wheel in dist/
	rm -rf dist build/lib
	$(BIN)/python -m build --no-isolation --outdir dist .

clean: ## remove all that make made
	rm -rf $(VENV) build dist $(OUT) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/demo.stamp: EXTRAS = export,openvino,report
$(VENV)/dev.stamp: EXTRAS = dev
$(VENV)/mutants.stamp: EXTRAS = dev,mutants
$(VENV)/%.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing edgetube[$(EXTRAS)] in $(VENV)"
	@$(PIP) --editable ".[$(EXTRAS)]" --constraint constraints.txt
	@touch $@
