# Every target does its own set-up; `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

DESTDIR ?=
PREFIX ?= /usr/local
SYSTEM_PYTHON ?= /usr/bin/python3

HOSTS ?= 3
BACKEND ?= vxlan
SECONDS ?= 600
MINUTES ?= 30
SEED ?=
PEER ?=
JOBS ?= 3

# Files of tests side by side, in processes of their own: most of a test is waiting. In order of
# their names: the short ones of tests/unit come last, and so all processes end at about one time.
SIDE_BY_SIDE = -n $(JOBS) --dist loadfile --no-loadscope-reorder

# A command each package is known by, and what has no command: the C library's and Python's headers.
PACKAGES := etcd:etcd-server ip:iproute2 iptables:iptables ping:iputils-ping nsenter:util-linux \
	openssl:openssl ethtool:ethtool gcc:gcc nft:nftables dockerd:docker.io docker:docker.io busybox:busybox-static \
	faketime:faketime systemd-analyze:systemd
VM_PACKAGES := qemu-system-x86_64:qemu-system-x86 mmdebstrap:mmdebstrap mkfs.ext4:e2fsprogs \
	depmod:kmod
HEADERS := libc6-dev python3-dev python3-venv
# Debian starts a daemon when it is installed, and docker's would change this machine's firewall.
# The tests start their own. See /usr/share/doc/init-system-helpers/README.policy-rc.d.gz.
POLICY := /usr/sbin/policy-rc.d
# Another apt that is at work, as an unattended upgrade, is waited for, up to so many seconds.
APT := apt-get -o DPkg::Lock::Timeout=300

.PHONY: help install packages compiled demo test lint unit netns docker chaos soak fuzz bench bench-vxlan \
	soak-udp bench-udp bench-hosts install-system test-systemd clean

help:
	@echo "make demo      three hosts, real etcd, real daemons: a first look (root; seconds, the first time minutes)"
	@echo "               HOSTS=5, BACKEND=host-gw or BACKEND=udp choose others"
	@echo "make test      lint, types, unit tests and, as root, the tests on the real kernel;"
	@echo "               JOBS=3 files of tests side by side, with 0 all one by one"
	@echo "make install   the virtual environment $(VENV) and the Debian packages that are missing"
	@echo "make lint      ruff and mypy only"
	@echo "make unit      unit tests only (no root, no network)"
	@echo "make netns     the tests on the real kernel only (root)"
	@echo "make docker    the tests with a real dockerd on each host only (root)"
	@echo "make chaos     failures of etcd with 20 hosts and a minute each (root; 6 min)"
	@echo "make soak      five hosts, a random fault every 10 s (root; MINUTES=30, BACKEND=, SEED=);"
	@echo "               what it has seen is in .soak, with a picture"
	@echo "make fuzz      a coverage-guided search for input that breaks a promise (SECONDS=600);"
	@echo "               what it finds is in .fuzz"
	@echo "make bench     start, scale, events, memory and traffic, measured (root; 10 min);"
	@echo "               PEER=/path/to/flanneld measures another one beside it; results in build/bench"
	@echo "make bench-vxlan  TCP between pods: our vxlan device against one made by hand (root; 1 min)"
	@echo "make soak-udp  2 GB of random data each way through the udp tunnel (root)"
	@echo "make bench-udp the udp tunnel's speed beside a C loop and the kernel (root; 13 min)"
	@echo "make bench-hosts  many hosts, without a kernel, on one real etcd: what that costs etcd"
	@echo "               (10 min; HOSTS=2000 is the default, not demo's 3); results in build/bench"
	@echo "make install-system  flanneld as a service of this machine, or of the tree DESTDIR= (PREFIX=$(PREFIX))"
	@echo "make test-systemd    the service in Debian machines of its own under qemu (root; up to an hour)"
	@echo "make clean     remove $(VENV) and everything that was built"

install: $(STAMP)

packages:
	@missing=""; \
	for pair in $(PACKAGES); do \
		command -v $${pair%%:*} >/dev/null || [ -x /usr/sbin/$${pair%%:*} ] || missing="$$missing $${pair##*:}"; \
	done; \
	$(PYTHON) -c 'import ensurepip, sysconfig, os; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' \
		2>/dev/null && [ -e /usr/include/stdio.h ] || missing="$$missing $(HEADERS)"; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" != 0 ]; then echo "missing Debian packages:$$missing (apt-get install them as root)"; exit 1; fi; \
	echo "installing$$missing"; \
	if [ ! -e $(POLICY) ]; then \
		trap 'rm -f $(POLICY)' EXIT INT TERM; printf '#!/bin/sh\nexit 101\n' >$(POLICY); chmod 755 $(POLICY); \
	fi; \
	$(APT) install -y --no-install-recommends $$missing >/dev/null 2>&1 || \
		{ $(APT) update -qq && $(APT) install -y -qq --no-install-recommends $$missing; }

$(STAMP): pyproject.toml flanneld/__init__.py Makefile
	@$(MAKE) --no-print-directory packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flanneld needs Python 3.11 or later: make PYTHON=...")'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "installing the Python packages into $(VENV)"
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --editable . --group dev
	@touch $@

# As an installation does. Without, each start of a daemon compiles its modules anew where Python is
# told not to write bytecode (PYTHONDONTWRITEBYTECODE): 30 ms.
compiled: $(STAMP)
	@$(BIN)/python -m compileall -q flanneld lab bench

demo: compiled
	@$(BIN)/python -m lab.demo --hosts $(HOSTS) --backend $(BACKEND)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: compiled
	$(BIN)/pytest $(SIDE_BY_SIDE) tests/unit

netns: compiled
	$(BIN)/pytest $(SIDE_BY_SIDE) tests/netns

docker: compiled
	$(BIN)/pytest tests/docker

chaos: compiled
	FLANNEL_CHAOS=1 $(BIN)/pytest -rP tests/chaos

soak: compiled
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(BIN)/python -m pip install --quiet --group plot
	PYTHONPATH=.:tests:tests/netns $(BIN)/python -m soak --minutes $(MINUTES) --backend $(BACKEND) \
		$(if $(SEED),--seed $(SEED)) --out .soak

# An environment of its own: what searches is no part of the tests.
.venv-fuzz/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	.venv-fuzz/bin/python -m pip install --quiet --editable . --group dev 'atheris>=3,<4'
	@touch $@

fuzz: .venv-fuzz/.installed
	PYTHONPATH=.:tests:tests/unit .venv-fuzz/bin/python -m fuzz.explore $(SECONDS) tests/fuzz/corpus .fuzz

soak-udp: compiled
	FLANNEL_UDP_MB=2000 $(BIN)/pytest tests/netns/test_udp_tunnel.py -k much_data

bench: compiled
	@$(BIN)/python -m pip install --quiet --group plot
	$(BIN)/python -m bench $(addprefix --peer ,$(PEER))

bench-udp: compiled
	$(BIN)/python -m bench.udp_tunnel
	@echo
	@echo "As between two machines: network cards that cut and join, a processor for each host"
	$(BIN)/python -m bench.udp_tunnel --wire

# As many as were asked for on the command line, else not demo's few.
bench-hosts: compiled
	$(BIN)/python -m bench.many_hosts $(if $(filter file,$(origin HOSTS)),2000,$(HOSTS))

test: lint compiled
	$(BIN)/pytest $(SIDE_BY_SIDE) tests

bench-vxlan: compiled
	$(BIN)/python -m bench.vxlan_throughput

install-system:
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" PYTHON="$(SYSTEM_PYTHON)" systemd/install.sh

test-systemd: compiled
	@$(MAKE) --no-print-directory packages PACKAGES="$(VM_PACKAGES)"
	$(BIN)/pytest -v tests/vm

clean:
	rm -rf $(VENV) .venv-fuzz .fuzz .soak build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find flanneld lab bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
