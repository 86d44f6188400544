# Karst: `make run` starts a container and a virtual machine on this host.
KARST_DIR ?= /var/lib/karst
export KARST_DIR

.PHONY: help run stop purge build install uninstall test test-all check bench deps test-deps deb

help:
	@echo "make run       install what is missing, build, start Karst in $(KARST_DIR), launch c1 and v1"
	@echo "make stop      stop Karst and its guests; their data stays"
	@echo "make purge     remove every trace of Karst in $(KARST_DIR) from this machine"
	@echo "make install   install programs, units and user below PREFIX (default /usr/local)"
	@echo "make deb       the same as a Debian package, in target/deb"
	@echo "make check     formatting, clippy, edges, generated documents"
	@echo "make test      what CI runs; make test-all: everything; make bench: figures beside the peers"

run:
	@scripts/run

stop:
	@scripts/stop

purge:
	@scripts/purge

deps:
	@scripts/install-dependencies runtime build

test-deps:
	@scripts/install-dependencies runtime build test

build: deps
	@PATH="$$HOME/.cargo/bin:$$PATH" cargo build --release --bins
	@scripts/build-guest-agent $${CARGO_TARGET_DIR:-target}/release

check:
	@PATH="$$HOME/.cargo/bin:$$PATH" cargo xtask check

test: test-deps
	@scripts/test

# Resumable; JOBS="lab/install e2e/long-kill" runs those only.
test-all: test-deps
	@scripts/install-dependencies clients
	@scripts/test-all $(JOBS)

bench: test-deps
	@bench/run

PREFIX ?= /usr/local
install:
	@scripts/install $(PREFIX)

uninstall:
	@scripts/install --remove $(PREFIX)

deb:
	@scripts/build-deb
