# instance-cloudimage: see README.md. Run "make help" for the targets.

PREFIX ?= /usr
SYSCONFDIR ?= /etc
DESTDIR ?=
BUNDLE = $(DESTDIR)$(PREFIX)/share/ganeti/os/cloudimage
CONFIG = $(DESTDIR)$(SYSCONFDIR)/ganeti/instance-cloudimage
COMMAND = $(DESTDIR)$(PREFIX)/sbin/cloudimage
MANUAL = $(DESTDIR)$(PREFIX)/share/man
COMPLETIONS = $(DESTDIR)$(PREFIX)/share/bash-completion/completions
UNITS = $(DESTDIR)$(PREFIX)/lib/systemd/system

# The doors run with the distribution's Python and its requests; so do the tests.
PYTHON = /usr/bin/python3
VENV = .venv
DOORS = create export import rename verify
PAGES = $(wildcard doc/man/*.[578])
COMPLETION = $(wildcard packaging/cloudimage.bash-completion)
SERVICES = $(wildcard packaging/*.service packaging/*.timer)

# A module counts by its text's hash, not by its date: packages and copies change dates, and a
# module that was edited on a node counts as it is. COMPILE=true compiles nothing.
COMPILE = $(PYTHON) -m compileall -q --invalidation-mode checked-hash

VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' lib/__init__.py)

# What the product needs on a node, and what only its tests need.
PACKAGES = bubblewrap bzip2 dosfstools fdisk gpgv gzip lz4 mtools python3 python3-requests \
	qemu-utils util-linux xz-utils zstd
TEST_PACKAGES = btrfs-progs cloud-guest-utils curl debhelper debian-archive-keyring dh-python dmsetup \
	dnsmasq-base dpkg-dev e2fsprogs ethtool ganeti gdisk git gnupg groff-base grub-common \
	grub-efi-amd64-bin grub-pc-bin iproute2 libarchive-tools lintian lua-yaml lua5.4 lzip \
	mmdebstrap openssh-client openssh-server openssl ovmf parted pigz pixz procps python3-configobj \
	python3-jinja2 python3-jsonpatch python3-jsonschema python3-oauthlib python3-venv python3-yaml \
	qemu-system-x86 rpm rpmlint socat strace tinyproxy xfsprogs
# what a root of another release has besides PACKAGES, for the targets that take NODE
GANETI_PACKAGES = curl e2fsprogs ganeti ganeti-testsuite gdisk grub-common grub-efi-amd64-bin grub-pc-bin \
	iptables mmdebstrap procps python3-pytest qemu-system-x86
STORAGE_PACKAGES = ceph-common ceph-mgr ceph-mon ceph-osd qemu-block-extra

help:
	@echo "make check      set up what the tests need, lint, and run the tests that need no root"
	@echo "make check-root the tests that need root: loop devices, a real Ganeti cluster, booted guests"
	@echo "make check-nodes [NODES=\"debian-11 ...\"]  the doors on every release that README names (root)"
	@echo "make check-guests  guests of six releases boot and say what they got: three quarters of an hour (root)"
	@echo "make check-storage  the tests on a real Ceph, and on LVM, DRBD, NFS and Gluster in virtual machines (root)"
	@echo "make check-ganeti [NODE=debian-13]  the tests on a real Ganeti with another release's (root)"
	@echo "make qa [NODE=debian-13]    Ganeti's own QA suite and burnin with this OS (root)"
	@echo "make demo [NODE=debian-13]  show the product at work in a throwaway cluster (root)"
	@echo "make bench      measure sizes and speeds against named peers (root)"
	@echo "make install    install the bundle [DESTDIR=] [PREFIX=/usr] [SYSCONFDIR=/etc]"
	@echo "make uninstall  take away what install put there, but not the configuration"
	@echo "make deb        build a Debian package in build/"
	@echo "make rpm        build an RPM in build/"
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
	$(VENV)/bin/pytest -m "not root and not cluster and not boot and not nodes and not storage and not guests"

check: packages lint test

check-root: packages setup
	$(VENV)/bin/pytest -m "root or cluster or boot"

check-nodes: packages setup
	NODES="$(NODES)" $(VENV)/bin/pytest -m nodes

check-guests: packages setup
	$(VENV)/bin/pytest -m guests

check-storage: TEST_PACKAGES += $(STORAGE_PACKAGES)
check-storage: packages setup
	$(VENV)/bin/pytest -m storage

# With NODE these run in the root of that release, with its Ganeti, and else on this machine.
IN = $(if $(NODE),$(VENV)/bin/python -m tests.nodes.roots $(NODE) $(GANETI_PACKAGES) --)
TESTS = tests/ganeti

check-ganeti: NODE = debian-13
check-ganeti: packages setup
	$(IN) python3 -m pytest -p no:cacheprovider $(TESTS)

qa: TEST_PACKAGES += ganeti-testsuite iptables
qa: packages $(if $(NODE),setup)
	$(IN) tests/qa

demo: packages $(if $(NODE),setup)
	$(IN) tests/demo

bench: packages
	tests/bench

metad-check: packages
	tests/metad/check $(GANETI_SOURCE)

# Another project of this name has the same places: nothing of it may be overwritten, or mixed with
# ours. Its bundle has doors and no lib/__init__.py; its variants.list names nothing that we have.
own-bundle:
	@test ! -e $(BUNDLE)/create || test -e $(BUNDLE)/lib/__init__.py || { \
	  echo "ERROR: $(BUNDLE) is another provider's ($$(ls -x -w 0 $(BUNDLE))): nothing was changed;" \
	    "remove or rename it first (doc/migration.md)"; exit 1; } >&2

own-config: own-bundle
	@names=$$(sed 's/#.*//' $(CONFIG)/variants.list 2>/dev/null | tr -s '[:space:]' ' '); test -z "$${names# }" || { \
	  for name in $$names; do \
	    for file in variants.d/$$name.conf $(CONFIG)/variants.d/$$name.conf; do ! test -e $$file || exit 0; done; \
	  done; \
	  echo "ERROR: $(CONFIG)/variants.list is another provider's (it names $${names% }): nothing was changed;" \
	    "remove or rename it first (doc/migration.md)"; exit 1; } >&2

# Modules come before doors: what is broken off here is not taken for another's bundle.
install: own-config
	install -d $(BUNDLE)/variants.d $(BUNDLE)/hooks.d/pre $(BUNDLE)/hooks.d/post \
	  $(BUNDLE)/doc/ganeti $(BUNDLE)/doc/examples $(dir $(COMMAND)) $(CONFIG)/variants.d $(CONFIG)/hooks.d/pre $(CONFIG)/hooks.d/post
	for module in $$(find lib -name '*.py'); do install -D -m 644 $$module $(BUNDLE)/$$module || exit; done
	umask 022; $(COMPILE) -d $(PREFIX)/share/ganeti/os/cloudimage/lib $(BUNDLE)/lib
	install -m 755 lib/cloudimage $(BUNDLE)/lib
	install -m 755 $(DOORS) $(BUNDLE)
	install -m 644 ganeti_api_version parameters.list README.md NEWS LICENSE $(BUNDLE)
	install -m 644 variants.d/*.conf $(BUNDLE)/variants.d
	install -m 644 hooks.d/pre/README $(BUNDLE)/hooks.d/pre
	install -m 644 hooks.d/post/README $(BUNDLE)/hooks.d/post
	install -m 644 doc/*.* $(BUNDLE)/doc
	install -m 644 doc/ganeti/* $(BUNDLE)/doc/ganeti
	install -m 644 doc/examples/* $(BUNDLE)/doc/examples
	for page in $(PAGES); do install -D -m 644 $$page $(MANUAL)/man$${page##*.}/$${page##*/} || exit; done
	for unit in $(SERVICES); do install -D -m 644 $$unit $(UNITS)/$${unit##*/} || exit; done
	test -z "$(COMPLETION)" || install -D -m 644 $(COMPLETION) $(COMPLETIONS)/cloudimage
	test -e $(CONFIG)/cloudimage.conf || install -m 644 doc/cloudimage.conf $(CONFIG)
	test -e $(CONFIG)/variants.list || install -m 644 variants.list $(CONFIG)
	ln -sfn $(SYSCONFDIR)/ganeti/instance-cloudimage/variants.list $(BUNDLE)/variants.list
	ln -sfn ../share/ganeti/os/cloudimage/lib/cloudimage $(COMMAND)
	@for name in $$(cat variants.list); do grep -qx "$$name" $(CONFIG)/variants.list || \
	  echo "variants.list is older and does not name $$name: Ganeti will not offer it until you add it"; done
	@echo "installed cloudimage $(VERSION)"

uninstall: own-bundle
	rm -rf $(BUNDLE)
	rm -f $(COMMAND) $(COMPLETIONS)/cloudimage
	for page in $(PAGES); do rm -f $(MANUAL)/man$${page##*.}/$${page##*/}; done
	for unit in $(SERVICES); do rm -f $(UNITS)/$${unit##*/}; done
	@echo "left alone: $(CONFIG) and the cache"

# What a release has in it.
RELEASE = instance-cloudimage-$(VERSION)
SOURCES = $(DOORS) ganeti_api_version parameters.list variants.list variants.d hooks.d lib doc packaging \
	Makefile README.md NEWS LICENSE

source:
	rm -rf build/$(RELEASE)
	mkdir -p build/$(RELEASE)
	tar -c --exclude=__pycache__ --mode=u+rwX,go+rX,go-w $(SOURCES) | tar -xp -C build/$(RELEASE)

# Changelogs say for each release of NEWS that NEWS has it.
RELEASES = sed -n 's/^\* Noteworthy changes in release \(.*\) (\(.*\))$$/\1 \2/p' NEWS
MAINTAINER = $(shell sed -n 's/^Maintainer: //p' packaging/debian/control)

deb: source
	rm -rf build/$(RELEASE)/debian
	cp -r packaging/debian build/$(RELEASE)/debian
	cp packaging/*.service packaging/*.timer build/$(RELEASE)/debian 2>/dev/null || true
	$(RELEASES) | while read -r version day; do \
	  printf 'instance-cloudimage (%s) unstable; urgency=medium\n\n  * Release %s: see NEWS.\n\n -- %s  %s\n\n' \
	    "$$version" "$$version" "$(MAINTAINER)" "$$(LC_ALL=C date -uRd "$$day")"; \
	done > build/$(RELEASE)/debian/changelog
	cd build/$(RELEASE) && dpkg-buildpackage --no-sign
	@echo "built build/instance-cloudimage_$(VERSION)_all.deb"

# rpm-build of EL knows what is installed; on Debian it does not.
rpm: source
	rm -rf build/rpm
	mkdir -p build/rpm/SOURCES
	tar -czf build/rpm/SOURCES/$(RELEASE).tar.gz -C build $(RELEASE)
	sed 's/@VERSION@/$(VERSION)/' packaging/instance-cloudimage.spec > build/instance-cloudimage.spec
	printf '\n%%%%changelog\n' >> build/instance-cloudimage.spec
	$(RELEASES) | while read -r version day; do \
	  printf '* %s %s - %s-1\n- Release %s: see NEWS.\n\n' \
	    "$$(LC_ALL=C date -d "$$day" '+%a %b %d %Y')" "$(MAINTAINER)" "$$version" "$$version"; \
	done >> build/instance-cloudimage.spec
	rpmbuild -ba --quiet --nodeps --define "_topdir $(CURDIR)/build/rpm" build/instance-cloudimage.spec
	cp build/rpm/RPMS/noarch/$(RELEASE)-*.noarch.rpm build
	@echo "built $$(ls build/$(RELEASE)-*.noarch.rpm)"

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help setup packages lint test check check-root check-nodes check-guests check-storage \
	check-ganeti qa demo bench \
	metad-check own-bundle own-config install uninstall source deb rpm clean
