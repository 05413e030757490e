# Two commands: `make demo` shows what Remit does, `make test` checks all of it.
# Both install what is missing (PostgreSQL's programs, Python packages).

PYTHON := .venv/bin/python

.PHONY: help deps build demo test lint run bench

help:
	@echo "make demo   build, start Remit on a database of its own, run the support agent"
	@echo "make test   format, lints, every test, the demo"
	@echo "make bench  the standard table of docs/performance.md, in ten minutes"
	@echo "make run    build and start the server on 127.0.0.1:50051, data in ./.remit"

deps:
	@scripts/deps.sh

build:
	cargo build --release

demo: deps build
	PYTHON=$(PYTHON) REMIT_BIN=target/release/remit examples/support-agent/demo.sh

lint:
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	scripts/buf-lint.sh

test: deps lint
	cargo test
	PYTHON=$(PYTHON) REMIT_BIN=target/debug/remit examples/support-agent/demo.sh
	PYTHON=$(PYTHON) REMIT_BIN=target/debug/remit examples/policy/run.sh
	PYTHON=$(PYTHON) REMIT_BIN=target/debug/remit examples/approval-gate/demo.sh
	PYTHON=$(PYTHON) REMIT_BIN=target/debug/remit examples/cycles-support-agent/demo.sh
	PYTHON=$(PYTHON) REMIT_BIN=target/debug/remit tests/cycles/run.sh
	PYTHON=$(PYTHON) REMIT_BIN=target/debug/remit tests/cycles/schemathesis.sh

bench: deps build
	target/release/remit bench --scenario table

run: deps build
	@scripts/run.sh
