# Every entry point a person needs. `make run` and `make test` start from a bare machine with python3 and gcc.

PYTHON ?= python3
ARGS   ?=
ifeq ($(origin CC),default)
CC := gcc
endif

VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
BUDGET ?= 16MiB
SECONDS ?= 60
JOBS   ?= 2

CSOURCES := $(sort $(wildcard csrc/os/*.c csrc/store/*.c csrc/region/*.c csrc/governor/*.c csrc/native/*.c))
CHEADERS := $(wildcard csrc/*.h csrc/*/*.h)
BINDING  := $(sort $(wildcard csrc/python/*.c))
BUILT_FROM := $(CSOURCES) $(CHEADERS) $(BINDING) $(wildcard native/*) setup.py pyproject.toml

CWARN    := -std=c11 -pthread -Wall -Wextra -Wshadow -Werror
SANITIZE := address,undefined
CSAN     := -O1 -g -fno-omit-frame-pointer -fsanitize=$(SANITIZE) -fno-sanitize-recover=all
CTESTS    = $(MAKE) --no-print-directory --jobs $(JOBS) --output-sync -f tests/core/build.mk CC=$(CC)
PYTEST    = $(BIN)/pytest --numprocesses $(JOBS) --dist loadgroup

# Containers often set it. The tests start a thousand interpreters, and each would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

# The same commit gives the same sdist and wheel, byte for byte.
SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --format=%ct 2>/dev/null),1767225600)

.PHONY: help run test test-native test-python test-system test-aarch64 stress bench bench-quick bench-paths bench-write
.PHONY: bench-ram bench-fragmentation bench-native bench-readers bench-scale bench-governor bench-spilling bench-dask lint coverage
.PHONY: sanitize tsan fuzz valgrind wheel wheel-smoke clean
.DELETE_ON_ERROR:
.NOTPARALLEL: # two pips in one environment would race

help:
	@echo 'make run          spill the standard library of python3 with a budget of $(BUDGET), and verify it'
	@echo 'make test         every promise: the C programs under sanitizers, then pytest (ARGS="-k name"; JOBS=$(JOBS))'
	@echo 'make test-system  more file systems, rounds of kill -9, Dask, native builds; the wheel in other interpreters'
	@echo 'make test-aarch64 the C programs, built for aarch64, under qemu (Debian: gcc-aarch64-linux-gnu qemu-user)'
	@echo 'make stress       threads call every verb: foreign ones, and those that all own the region; with ASan, SECONDS=$(SECONDS)'
	@echo 'make coverage     lines and branches of the C core and of the package that core/, api/ and promises/ of tests reach'
	@echo 'make bench        benchmarks, pages and pictures in benchmarks/results (make bench-quick: the short form, in build/results)'
	@echo 'make bench-write  cold and warm writes beside plain copies; the price of opening (ARGS=--quick)'
	@echo 'make bench-ram    spilling under a limit, in a small cgroup, and back (ARGS=--quick)'
	@echo 'make bench-readers reading in another process, beside other ways there (ARGS=--quick)'
	@echo 'make bench-spilling mappings that spill, beside zict, diskcache, shelve, joblib (ARGS=--quick)'
	@echo 'make bench-dask   work on Dask workers that spill, to files and to regions (ARGS=--quick)'
	@echo 'make bench-scale  cost against count: up to 32 million small values, and 16 GiB of large ones (ARGS=--quick)'
	@echo 'make bench-paths  what the thresholds of the C core rest on'
	@echo 'make bench-fragmentation  space needed beyond the live values, against malloc and jemalloc (ARGS=--quick)'
	@echo 'make bench-native what a call costs from C, C++, numba, cffi and Python (ARGS=--quick)'
	@echo 'make bench-governor what a reservation costs, beside counters behind a lock (ARGS=--quick)'
	@echo 'make lint         ruff, mypy --strict, C warnings as errors'
	@echo 'make sanitize     the pytest suite on a build with ASan and UBSan'
	@echo 'make tsan         the threads of the C core under ThreadSanitizer'
	@echo 'make fuzz         libFuzzer with ASan and UBSan, SECONDS=$(SECONDS) for each program (needs clang)'
	@echo 'make valgrind     the C programs under valgrind: no error, no leak'
	@echo 'make wheel        sdist and abi3 wheel (manylinux tag) in dist/'
	@echo 'make wheel-smoke  install that wheel in each CPython found and try it'
	@echo 'make clean        remove what make made'

# --- set-up, each step once ------------------------------------------------------------------------------------

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# $(VENV)/.extra-NAME: the packages that pyproject.toml lists under that name.
EXTRA = import sys, tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")

$(VENV)/.extra-%: $(VENV)/.made pyproject.toml
	$(BIN)/python -c '$(EXTRA)' $* > $(VENV)/extra-$*.txt
	$(PIP) install -r $(VENV)/extra-$*.txt
	@touch $@

# Editable: Python changes count at once, changes of the C core at the next make.
$(VENV)/.installed: $(VENV)/.made $(BUILT_FROM)
	$(PIP) install --editable .
	@touch $@

# --- run and test ----------------------------------------------------------------------------------------------

STDLIB = import pathlib, sysconfig; \
	print(*sorted(p for p in pathlib.Path(sysconfig.get_path("stdlib")).iterdir() if p.name != "site-packages"))

run: $(VENV)/.installed $(VENV)/.extra-cli
	@$(BIN)/nodedb-mem spill --budget $(BUDGET) $(ARGS) $$($(BIN)/python -c '$(STDLIB)')

test: test-native test-python

test-native:
	$(CTESTS) OUT=build/native FLAGS="$(CSAN)"

test-python: $(VENV)/.installed $(VENV)/.extra-test
	$(PYTEST) -m "not system" $(ARGS)

# The benchmarks' twin is held to the region's promises here. The pages on native code need their compilers.
test-system: $(VENV)/.installed $(VENV)/.extra-test $(VENV)/.extra-native-test
	$(PYTEST) -m system tests benchmarks/test_twin.py $(ARGS)
	$(PYTEST) docs/native.md tests/api/test_docs.py $(ARGS)
	$(MAKE) wheel-smoke

# The core for the other architecture, by Debian's cross compiler, in the user mode of qemu. Without sanitizers, which do not
# run there. What qemu lacks the programs find out, and say.
CROSS := aarch64-linux-gnu

test-aarch64:
	$(CTESTS) CC=$(CROSS)-gcc OUT=build/aarch64 FLAGS="-O2 -g" RUN="qemu-aarch64 -L /usr/$(CROSS)"

# Foreign threads call every verb while the owner opens, works and closes, and owners all call every verb: for SECONDS each.
stress:
	$(CTESTS) OUT=build/native FLAGS="$(CSAN)" PROGRAMS="stress_foreign test_process" SECONDS=$(SECONDS)

# --- benchmarks ------------------------------------------------------------------------------------------------

# ARGS go to all four: --quick, --directory DIR.
bench: $(VENV)/.installed $(VENV)/.extra-bench
	$(BIN)/pytest benchmarks --confcutdir=benchmarks -o python_files='bench_*.py' -o timeout=0 -W default $(if $(QUICK),--quick) $(ARGS)
	$(BIN)/python benchmarks/report.py $(if $(QUICK),--quick) $(ARGS)
	$(BIN)/python benchmarks/league.py $(if $(QUICK),--quick) $(ARGS)
	$(BIN)/python benchmarks/governor.py $(if $(QUICK),--quick) $(ARGS)

bench-quick:
	$(MAKE) bench QUICK=1

build/bench/%: benchmarks/native/%.c $(CSOURCES) $(CHEADERS) $(wildcard benchmarks/native/*.h)
	@mkdir -p $(@D)
	$(CC) $(CWARN) -O2 -DNDEBUG -Icsrc -o $@ $< $(if $(filter %/region_writes %/scale,$@),$(CSOURCES))

bench-write: $(VENV)/.installed $(VENV)/.extra-bench build/bench/region_writes
	$(BIN)/python benchmarks/write_path.py $(ARGS)

bench-ram: $(VENV)/.installed $(VENV)/.extra-bench
	$(BIN)/python benchmarks/ram.py $(ARGS)

bench-readers: $(VENV)/.installed $(VENV)/.extra-bench
	$(BIN)/python benchmarks/readers.py $(ARGS)

bench-spilling: $(VENV)/.installed $(VENV)/.extra-bench
	$(BIN)/python -W ignore benchmarks/spilling.py $(ARGS)

bench-dask: $(VENV)/.installed $(VENV)/.extra-bench
	$(BIN)/python benchmarks/dask_spill.py $(ARGS)

bench-scale: $(VENV)/.installed $(VENV)/.extra-bench build/bench/scale
	$(BIN)/python benchmarks/scale.py $(ARGS)

bench-paths: build/bench/write_paths
	@mkdir -p benchmarks/results
	build/bench/write_paths . $(ROUNDS) | tee benchmarks/results/write-paths.md

bench-fragmentation: $(VENV)/.extra-bench
	$(BIN)/python benchmarks/fragmentation.py $(if $(QUICK),--quick) $(ARGS)

bench-governor: $(VENV)/.installed $(VENV)/.extra-bench
	$(BIN)/python benchmarks/governor.py $(if $(QUICK),--quick) $(ARGS)

bench-native: $(VENV)/.installed $(VENV)/.extra-bench $(VENV)/.extra-native-test
	$(BIN)/python benchmarks/native_calls.py $(ARGS)

# --- checks ----------------------------------------------------------------------------------------------------

lint: $(VENV)/.extra-lint $(VENV)/.extra-cli
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@set -e; include=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	for source in $(CSOURCES) $(BINDING); do for flags in "-DNDEBUG" "-UNDEBUG"; do \
	    echo "$(CC) $(CWARN) $$flags $$source"; \
	    $(CC) $(CWARN) -O2 $$flags -Icsrc -isystem "$$include" -c -o /dev/null "$$source"; \
	done; done

# A copy of the tree with its own environment, so that no test can pick up the ordinary build.
SAN      := build/sanitize
SAN_TREE := CHANGELOG.md LICENSE README.md benchmarks conftest.py csrc docs examples native nodedb_mem pyproject.toml setup.py tests
# libstdc++ comes along because ASan looks for the C++ throw hook at start, before pyarrow brings that library in.
SAN_ENV   = LD_PRELOAD="$$($(CC) -print-file-name=libasan.so):$$($(CC) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:$$ASAN_OPTIONS \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:$$UBSAN_OPTIONS \
	PYTHONMALLOC=malloc NODEDB_MEM_SANITIZE=$(SANITIZE)

$(SAN)/.extra-test: pyproject.toml $(VENV)/.extra-test
	$(PYTHON) -m venv $(SAN)/venv
	$(SAN)/venv/bin/python -m pip --disable-pip-version-check --quiet install -r $(VENV)/extra-test.txt
	@touch $@

sanitize: $(SAN)/.extra-test
	rm -rf $(SAN)/tree
	mkdir -p $(SAN)/tree
	tar -cf - --exclude='*.so' --exclude=nodedb_mem/lib --exclude=__pycache__ $(wildcard $(SAN_TREE)) | tar -xf - -C $(SAN)/tree
	cd $(SAN)/tree && NODEDB_MEM_SANITIZE=$(SANITIZE) NODEDB_MEM_DEBUG=1 \
	    ../venv/bin/python -m pip --disable-pip-version-check --quiet install --editable .
	cd $(SAN)/tree && $(SAN_ENV) ../venv/bin/python ../venv/bin/pytest --numprocesses $(JOBS) --dist loadgroup \
	    -o timeout=900 $(ARGS)

# A copy of the tree, built to count. Assertions are on, their branches do not count. The mark untraced is for what Python's
# tracer does not survive. The first import makes the files of counts, to which tests that become nobody add theirs.
COV      := build/coverage
COV_ENV   = PYTHONPATH=$(CURDIR)/$(COV)

coverage: $(VENV)/.installed $(VENV)/.extra-test $(VENV)/.extra-coverage
	rm -rf $(COV)
	mkdir -p $(COV)
	tar -cf - --exclude=__pycache__ $(wildcard $(SAN_TREE)) | tar -xf - -C $(COV)
	cd $(COV) && NODEDB_MEM_DEBUG=1 CFLAGS="--coverage -fprofile-update=atomic" LDFLAGS=--coverage \
	    $(CURDIR)/$(BIN)/python setup.py --quiet build_ext --inplace
	cd $(COV) && $(CTESTS) OUT=build/native FLAGS="-O1 -g --coverage -fprofile-update=atomic"
	cd $(COV) && $(COV_ENV) $(CURDIR)/$(BIN)/python -c "import nodedb_mem" && chmod -R a+rwX .
	cd $(COV) && $(COV_ENV) $(CURDIR)/$(PYTEST) -m "not untraced" tests/api tests/promises --cov --cov-report=term $(ARGS)
	cd $(COV) && $(COV_ENV) $(CURDIR)/$(PYTEST) -m untraced
	cd $(COV) && $(CURDIR)/$(BIN)/gcovr --root . --filter csrc/ --exclude-branches-by-pattern '.*\bassert\(.*' \
	    --txt-metric line --txt - --print-summary build

# The fixed layout of setarch is for kernels whose random layout ThreadSanitizer does not know. It knows no fences, and
# says so with -Wtsan: those of the slot table are for other processes.
tsan:
	$(CTESTS) OUT=build/tsan PROGRAMS="test_readers test_writer test_governor_threads test_process" RUN="setarch -R" \
	    FLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=thread -Wno-tsan"

# libFuzzer comes with clang. The core of fuzz_region and fuzz_table makes its system calls through tests/fuzz/disk.c.
CLANG    ?= clang
FUZZ     := build/fuzz
FUZZERS  := fuzz_extents fuzz_region fuzz_table
CFUZZ    := $(CWARN) -O1 -g -fno-omit-frame-pointer -fsanitize=$(SANITIZE),fuzzer-no-link -fno-sanitize-recover=all \
	-Icsrc -Itests/fuzz
FUZZCORE := $(patsubst csrc/%.c,$(FUZZ)/%.o,$(CSOURCES))

$(FUZZ)/%.o: csrc/%.c $(CHEADERS) tests/fuzz/faults.h
	@mkdir -p $(@D)
	$(CLANG) $(CFUZZ) -include tests/fuzz/faults.h -c -o $@ $<

$(FUZZ)/fuzz_extents: tests/fuzz/fuzz_extents.c $(wildcard csrc/store/extents*.c) $(wildcard csrc/store/extents*.h)
	@mkdir -p $(@D)
	$(CLANG) $(CFUZZ) -fsanitize=fuzzer -o $@ $(filter %.c,$^)

$(FUZZ)/fuzz_region $(FUZZ)/fuzz_table: $(FUZZ)/%: tests/fuzz/%.c tests/fuzz/disk.c $(FUZZCORE) tests/fuzz/disk.h
	$(CLANG) $(CFUZZ) -fsanitize=fuzzer -o $@ $(filter %.c %.o,$^)

# First what is known, then what chance finds; new inputs go to build/fuzz/corpus, an input that fails to build/fuzz.
fuzz: $(addprefix $(FUZZ)/,$(FUZZERS))
	@set -e; for fuzzer in $(FUZZERS); do \
	    known=tests/fuzz/corpus/$$fuzzer; found=$(FUZZ)/corpus/$$fuzzer; mkdir -p $$found; \
	    echo "$$fuzzer: the kept corpus, then $(SECONDS) s"; \
	    $(FUZZ)/$$fuzzer -verbosity=0 -runs=0 $$known; \
	    $(FUZZ)/$$fuzzer -verbosity=0 -print_final_stats=1 -timeout=20 -max_len=2048 -max_total_time=$(SECONDS) \
	        -artifact_prefix=$(FUZZ)/ $$found $$known; \
	done

# Without sanitizers, which valgrind cannot stand.
# Not test_writer: it duplicates mappings by mremap of 0 bytes, which valgrind refuses. It runs under ASan and TSan.
# Not test_forks and test_process: a child keeps the books of other threads' regions, and valgrind takes them for leaks.
# Not test_last_error: valgrind takes the part that a moved mapping has gained for memory that may not be written to.
# Nor test_governor_threads: one thread would wait for another's lock on a file, and valgrind lets no other run meanwhile.
# Nor test_governor_deaths, which traces.
CHECKED := $(filter-out test_writer test_forks test_process test_last_error test_governor_threads test_governor_deaths,\
	$(notdir $(basename $(wildcard tests/core/test_*.c))))

valgrind:
	$(CTESTS) OUT=build/valgrind FLAGS="-O1 -g" PROGRAMS="$(CHECKED)" RUN="valgrind --quiet --error-exitcode=99 \
	    --leak-check=full --errors-for-leak-kinds=definite,indirect,possible --child-silent-after-fork=yes"

wheel: $(VENV)/.extra-dist
	SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) bash scripts/dist.sh $(BIN)/python

wheel-smoke: wheel
	bash scripts/wheel_smoke.sh dist/*-abi3-*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info nodedb_mem/*.so nodedb_mem/include nodedb_mem/lib nodedb_mem/__init__.pxd
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
