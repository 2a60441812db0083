# Everything that README.md and .ci/run call. `make help` lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# The versions that everything is installed at.
CONSTRAINTS := constraints.txt
# The first Python of 3.11 or later; PYTHON=... chooses another.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.14 python3,$(shell \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
# Processes that `make test` runs the tests of Python in, a file in one of them: at most four, for each may load a model.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count(), 4))')
# What `make wheels` builds for, and the Pythons that `make test-wheel` installs a wheel in: all that are found.
WHEEL_TARGETS ?= x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu aarch64-apple-darwin x86_64-apple-darwin
PYTHONS ?= $(foreach name,python3.11 python3.12 python3.13 python3.14,$(shell \
	$(name) -c 'import sys; print(sys.executable)' 2>/dev/null))
OWN_WHEEL = $(shell ls -t dist/*linux*_$$(uname -m).whl | head -1)
# The suite of Debian whose Python for aarch64 `make test-wheel-aarch64` runs.
ARM_SUITE ?= bookworm
ARM_ROOT := target/aarch64-$(ARM_SUITE)
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find src)

# One stamp for each stage; a stage runs again only when what it was made from has changed.
NEWEST := .venv-newest
MADE := $(VENV)/.made
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev
CORE := $(VENV)/.core

# So that every cargo command sees the same interpreter and none compiles pyo3 anew.
export PYO3_PYTHON := $(abspath $(BIN)/python)

.PHONY: help serve test test-install test-thorough test-parallel test-peft wheel wheels test-wheel test-wheel-aarch64 test-page test-clients test-gguf test-families test-aarch64 test-miri test-sanitizer docs otelcol build lint fmt openapi models man rooms conformance flags bench bench-overhead bench-peers soak kill fuzz simulate test-gpu test-gpu-dry constraints test-newest clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: build ## build what is not built, fetch the default model once, and serve it; ARGS="--port 8000" for flags
	@echo "==> lmserve serve $(ARGS)"
	@$(BIN)/lmserve serve $(ARGS)

build: $(CORE) ## the virtual environment with lmserve and its Rust core (release) in it

test: $(DEV) $(CORE) lint ## lint, and all tests of Rust and Python
	@echo "==> cargo test"
	cargo test --locked --no-default-features
	@echo "==> pytest"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-thorough: $(DEV) $(CORE) ## the tests of Python with all random inputs that they can make, of which `make test` tries a part
	THOROUGH=1 EXAMPLES=$(or $(EXAMPLES),100) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-peft: build $(DEV) ## adapters that PEFT writes beside what it merges, with PEFT and accelerate in a folder of their own
	$(BIN)/python tools/install.py --constraint $(CONSTRAINTS) --no-deps --target target/peft psutil --group peft
	PYTHONPATH=target/peft $(BIN)/python -m pytest tests/engine/test_peft.py

test-page: build $(DEV) ## the page at / in headless Chromium, which must be installed
	$(BIN)/python tools/install.py --constraint $(CONSTRAINTS) --group page
	$(BIN)/python -m pytest tests/page

test-install: ## what a new user types: maturin develop and lmserve serve in a fresh environment with its Python's own pip
	$(PYTHON) tools/plain_venv.py

wheel: $(RUNTIME) ## a wheel for this kind of machine in dist/, without debug symbols
	$(BIN)/maturin build --release --locked --strip --out dist

wheels: $(RUNTIME) ## wheels for Linux and macOS on x86-64 and ARM in dist/, by zig: needs rustup; WHEEL_TARGETS=...
	$(BIN)/python tools/install.py --constraint $(CONSTRAINTS) ziglang
	rustup target add $(WHEEL_TARGETS)
	@for target in $(WHEEL_TARGETS); do \
		echo "==> $$target"; \
		PATH="$(abspath $(BIN)):$$PATH" $(BIN)/maturin build --release --locked --strip --zig --target $$target --out dist || exit 1; \
	done

test-wheel: ## install a wheel of dist/ in a fresh environment of each Python found, 3.11 to 3.14, and ask it; PYTHONS=..., WHEEL=...
	@for python in $(PYTHONS); do $$python tools/plain_venv.py --wheel "$(or $(WHEEL),$(OWN_WHEEL))" || exit 1; done

test-wheel-aarch64: $(ARM_ROOT) ## the same of a wheel for aarch64 in dist/, in an emulator: needs debootstrap and qemu-aarch64
	$(PYTHON) tools/emulated_wheel.py $(ARM_ROOT) "$$(ls -t dist/*linux*_aarch64.whl | head -1)"

$(ARM_ROOT):
	debootstrap --arch=arm64 --foreign --variant=minbase --include=python3 $(ARM_SUITE) $@
	@for package in $@/var/cache/apt/archives/*.deb; do dpkg-deb --extract $$package $@ || exit 1; done

test-clients: build $(DEV) ## coding agents and SDKs of others against the server: from npm and PyPI, into a cache folder
	$(BIN)/python tests/clients/installed.py
	TEST_CLIENTS=1 $(BIN)/python -m pytest -rs tests/clients

test-parallel: build $(DEV) ## tiny models of every family split among four processes
	RANKS=4 $(BIN)/python -m pytest --timeout=1800 tests/engine/test_tensor_parallel.py

test-families: build $(DEV) ## every family in every mode from GGUF files, as `make test` runs them from safetensors
	FORM=gguf $(BIN)/python -m pytest -n $(WORKERS) tests/engine/test_model_equal.py

test-gguf: build $(DEV) ## llama.cpp's converter and server as an oracle: LLAMA_CPP_SOURCE names its source, LLAMA_CPP_SERVER its llama-server
	$(BIN)/python -m pytest -rs --timeout=1800 tests/engine/test_llama_cpp.py

docs: $(MADE) ## the docs as a site in target/site; links and anchors are checked
	$(BIN)/python tools/install.py --constraint $(CONSTRAINTS) --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "==> $(BIN)/python -m http.server --directory target/site"

otelcol: ## build OpenTelemetry's collector with Go, for the test that sends it a trace
	go run go.opentelemetry.io/collector/cmd/builder@v0.165.0 --config tests/http/otelcol.yaml

ARM := --locked --release --lib --no-default-features --target aarch64-unknown-linux-gnu
test-aarch64: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER := aarch64-linux-gnu-gcc
test-aarch64: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER := qemu-aarch64 -L /usr/aarch64-linux-gnu
test-aarch64: ## lint and test the CPU kernels for aarch64, in an emulator: needs aarch64-linux-gnu-gcc and qemu-aarch64
	cargo clippy $(ARM) -- -D warnings
	cargo test $(ARM) -- cpu::

# What Miri can run of the kernels' tests in minutes: it has the portable kernels only, and is some thousand times slower.
MIRI_TESTS ?= cpu::memory cpu::pool::tests::chunks cpu::pool::tests::shares cpu::program cpu::row_ops \
	cpu::quant::gguf cpu::elementwise::tests::a_pooled cpu::attention::tests::a_plan
test-miri: export MIRIFLAGS := -Zmiri-disable-isolation -Zmiri-permissive-provenance -Zmiri-deterministic-floats
test-miri: ## the unsafe code of the portable kernels in Miri: needs the nightly toolchain with miri and rust-src
	cargo +nightly miri test --locked --lib --no-default-features --target-dir target/miri -- $(MIRI_TESTS) --skip lasting

# The tests of attention and experts take two thirds of the kernels' time, so they are a run of their own:
# make test-sanitizer KERNELS="cpu::attention cpu::experts". The first build takes longest; target/sanitizer keeps it.
KERNELS ?= cpu:: --skip cpu::attention --skip cpu::experts
test-sanitizer: export RUSTFLAGS := -Zsanitizer=address
test-sanitizer: ## the kernels of this processor under the address sanitizer, but for attention and experts (KERNELS=...): needs the nightly toolchain
	cargo +nightly test --locked --lib --no-default-features --target $(shell rustc -vV | sed -n 's/host: //p') \
		--target-dir target/sanitizer -- $(KERNELS)

lint: $(DEV) $(CORE) ## formats, clippy, ruff, mypy, and the type stub against the built core
	@echo "==> lint"
	@cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || rustup component add rustfmt clippy
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --all-targets --no-default-features -- -D warnings
	$(BIN)/ruff check python tests tools benchmarks
	$(BIN)/ruff format --check python tests tools benchmarks
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest lmserve._core

fmt: $(DEV) ## format Rust and Python, and apply ruff's safe fixes
	cargo fmt
	$(BIN)/ruff check --fix-only python tests tools benchmarks
	$(BIN)/ruff format python tests tools benchmarks

openapi: build ## write docs/openapi.json anew, after a change of the API
	$(BIN)/python tools/openapi.py docs/openapi.json

models: build ## write docs/models.md anew, after a change of the families or of the types of weights
	$(BIN)/python tools/models.py docs/models.md

man: build ## write the manual page lmserve(1) into target/man/ from the command line's help
	$(BIN)/python tools/man.py target/man/lmserve.1

rooms: ## write the picture in ARCHITECTURE.md anew, after a change of who imports whom
	$(BIN)/python tools/rooms.py ARCHITECTURE.md

conformance: build $(DEV) ## write docs/conformance.md anew, after a change of what becomes of a parameter
	WRITE_CONFORMANCE=1 $(BIN)/python -m pytest tests/http/test_conformance.py

flags: build $(DEV) ## write docs/flags.md anew, after a change of the flags of lmserve serve
	WRITE_FLAGS=1 $(BIN)/python -m pytest tests/test_readme.py -k table_of_flags

bench: ## what a step costs the scheduler, and how close the CPU kernels come to what this machine can do
	cargo bench --locked --no-default-features --bench scheduler --bench cpu_linear --bench cpu_attention

bench-overhead: build ## what a token costs engine and HTTP server, without a model
	$(BIN)/python benchmarks/overhead.py

bench-peers: build ## lmserve beside the peers found on this machine, see benchmarks/README.md; ARGS="--rounds 1"
	$(BIN)/python benchmarks/peers.py $(ARGS)

soak: build ## ten minutes of mixed load with clients that leave, and what the server holds meanwhile; ARGS="--minutes 2"
	$(BIN)/python benchmarks/soak.py $(ARGS)

kill: build $(DEV) ## kill a server 100 times at random points of 1,000 turns of each kind and 1,000 lines of each batch: KILLS=..., SEED=...
	KILLS=$(or $(KILLS),100) SEED=$(or $(SEED),1) $(BIN)/python -m pytest -rP tests/http/test_kill.py

fuzz: build $(DEV) ## send each route 300 requests that its schema allows, or does not: EXAMPLES=...
	EXAMPLES=$(or $(EXAMPLES),300) $(BIN)/python -m pytest --timeout=3600 tests/http/test_schemathesis.py

test-gpu: build $(DEV) ## the tests that need a GPU, in minutes; DEVICE=cpu runs those that the CPU can run
	$(if $(filter cpu,$(DEVICE)),TRITON_INTERPRET=1 )DEVICE=$(or $(DEVICE),cuda) $(BIN)/python -m pytest -rs --durations=10 tests/gpu

test-gpu-dry: build $(DEV) ## the same tests and benchmarks/gpu.py on the CPU, with tiny models, in a minute
	DRY_RUNS=1 $(BIN)/python -m pytest -rs tests/kernels/test_interpreted.py -k dry_run

simulate: build ## prove the core under chance: SEED=... replays a run, STEPS=... (default: ten million)
	$(BIN)/lmserve simulate $(if $(SEED),--seed $(SEED)) --steps $(or $(STEPS),10000000)

constraints: $(MADE) ## write constraints.txt anew: the newest versions that pyproject.toml allows
	$(BIN)/python tools/constrain.py $(CONSTRAINTS) --upgrade

test-newest: ## the tests with the newest version of everything, in an environment of their own: what a release would break
	$(MAKE) VENV=$(NEWEST) $(NEWEST)/.made
	$(NEWEST)/bin/python tools/constrain.py $(NEWEST)/constraints.txt --upgrade
	-diff $(CONSTRAINTS) $(NEWEST)/constraints.txt
	$(MAKE) VENV=$(NEWEST) CONSTRAINTS=$(NEWEST)/constraints.txt test

clean: ## remove what was built here, the virtual environment included; the model cache stays
	rm -rf $(VENV) $(NEWEST) target dist .pytest_cache .mypy_cache .ruff_cache .hypothesis python/lmserve/_core*.so
	find python tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(MADE):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed, and none was found: install it, or say PYTHON=/path/to/python3"; exit 1; }
	@echo "==> virtual environment $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) uv
	@touch $@

$(RUNTIME): $(MADE) pyproject.toml $(CONSTRAINTS) tools/install.py
	@echo "==> dependencies"
	@$(BIN)/python tools/install.py --constraint $(CONSTRAINTS) -r pyproject.toml maturin
	@touch $@

$(DEV): $(RUNTIME)
	@echo "==> dependencies of the tests (torch is the large one)"
	@$(BIN)/python tools/install.py --constraint $(CONSTRAINTS) -r pyproject.toml --all-extras --group test --group docs
	@touch $@

$(CORE): $(RUNTIME) $(RUST_SOURCES) README.md
	@command -v cargo >/dev/null || { echo "Rust 1.89 or later is needed, and cargo was not found: see https://rustup.rs"; exit 1; }
	@echo "==> Rust core, release build"
	@$(BIN)/maturin develop --release --locked --uv
	@touch $@
