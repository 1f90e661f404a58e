# instance-cloudimage: see README.md. Run "make help" for the targets.

PREFIX ?= /usr
SYSCONFDIR ?= /etc
DESTDIR ?=
BUNDLE = $(DESTDIR)$(PREFIX)/share/ganeti/os/cloudimage
CONFIG = $(DESTDIR)$(SYSCONFDIR)/ganeti/instance-cloudimage
COMMAND = $(DESTDIR)$(PREFIX)/sbin/cloudimage

# The doors run with the distribution's Python and its requests; so do the tests.
PYTHON = /usr/bin/python3
VENV = .venv
DOORS = create export import rename verify

# What the product needs on a node, and what only its tests need.
PACKAGES = bubblewrap bzip2 dosfstools fdisk gpgv gzip lz4 mtools python3 python3-requests \
	qemu-utils util-linux xz-utils zstd
TEST_PACKAGES = btrfs-progs cloud-guest-utils curl debian-archive-keyring dmsetup dnsmasq-base \
	e2fsprogs ethtool ganeti gdisk git gnupg grub-common grub-pc-bin iproute2 libarchive-tools \
	mmdebstrap openssh-client openssh-server openssl parted pigz procps python3-configobj \
	python3-jinja2 python3-jsonpatch python3-jsonschema python3-oauthlib python3-venv python3-yaml \
	qemu-system-x86 socat strace tinyproxy xfsprogs
STORAGE_PACKAGES = ceph-common ceph-mgr ceph-mon ceph-osd qemu-block-extra

help:
	@echo "make check      set up what the tests need, lint, and run the tests that need no root"
	@echo "make check-root the tests that need root: loop devices, a real Ganeti cluster, booted guests"
	@echo "make check-storage  the tests on a real Ceph of one node on 127.0.0.1 (root)"
	@echo "make demo       show the product at work on this machine, in a throwaway cluster (root)"
	@echo "make bench      measure sizes and speeds against named peers (root)"
	@echo "make install    install the bundle [DESTDIR=] [PREFIX=/usr] [SYSCONFDIR=/etc]"
	@echo "make uninstall  take away what install put there, but not the configuration"
	@echo "make metad-check GANETI_SOURCE=CLONE  prove the change of ganeti-metad (root, not in CI)"

setup: $(VENV)/complete

packages:
	@missing=; for package in $(PACKAGES) $(TEST_PACKAGES); do \
	  dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; \
	done; test -z "$$missing" || if [ "$$(id -u)" = 0 ]; then \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	else echo "as root, install:$$missing (tests that need them are skipped)"; fi

$(VENV)/complete: tests/requirements.txt | packages
	$(PYTHON) -m venv --clear --system-site-packages $(VENV)
	$(VENV)/bin/pip install -q -r tests/requirements.txt
	# its dependency urllib3 would hide Debian's, which the doors use
	$(VENV)/bin/pip install -q --no-deps types-requests==2.33.0.20261030
	touch $@

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/vermin --quiet --no-tips --violations -t=3.9- lib

test: setup
	$(VENV)/bin/pytest -m "not root and not cluster and not boot and not storage"

check: packages lint test

check-root: packages setup
	$(VENV)/bin/pytest -m "root or cluster or boot"

check-storage: TEST_PACKAGES += $(STORAGE_PACKAGES)
check-storage: packages setup
	$(VENV)/bin/pytest -m storage

demo: packages
	tests/demo

bench: packages
	tests/bench

metad-check: packages
	tests/metad/check $(GANETI_SOURCE)

install:
	install -d $(BUNDLE)/variants.d $(BUNDLE)/hooks.d/pre $(BUNDLE)/hooks.d/post \
	  $(BUNDLE)/doc/ganeti $(dir $(COMMAND)) $(CONFIG)/variants.d $(CONFIG)/hooks.d/pre $(CONFIG)/hooks.d/post
	install -m 755 $(DOORS) $(BUNDLE)
	install -m 644 ganeti_api_version parameters.list README.md LICENSE $(BUNDLE)
	for module in $$(find lib -name '*.py'); do install -D -m 644 $$module $(BUNDLE)/$$module; done
	install -m 755 lib/cloudimage $(BUNDLE)/lib
	install -m 644 variants.d/*.conf $(BUNDLE)/variants.d
	install -m 644 hooks.d/pre/README $(BUNDLE)/hooks.d/pre
	install -m 644 hooks.d/post/README $(BUNDLE)/hooks.d/post
	install -m 644 doc/*.* $(BUNDLE)/doc
	install -m 644 doc/ganeti/* $(BUNDLE)/doc/ganeti
	test -e $(CONFIG)/cloudimage.conf || install -m 644 doc/cloudimage.conf $(CONFIG)
	test -e $(CONFIG)/variants.list || install -m 644 variants.list $(CONFIG)
	ln -sfn $(SYSCONFDIR)/ganeti/instance-cloudimage/variants.list $(BUNDLE)/variants.list
	ln -sfn ../share/ganeti/os/cloudimage/lib/cloudimage $(COMMAND)
	@for name in $$(cat variants.list); do grep -qx "$$name" $(CONFIG)/variants.list || \
	  echo "variants.list is older and does not name $$name: Ganeti will not offer it until you add it"; done
	@echo "installed cloudimage $$(sed -n 's/^__version__ = "\(.*\)"/\1/p' lib/__init__.py)"

uninstall:
	rm -rf $(BUNDLE)
	rm -f $(COMMAND)
	@echo "left alone: $(CONFIG) and the cache"

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help setup packages lint test check check-root check-storage demo bench metad-check install uninstall clean
