# The C programs of this folder: make -f tests/core/build.mk OUT=build/native FLAGS=... [PROGRAMS="test_writer ..."] run
#
# The core is compiled once for all of them, with the programs' own flags. RUN stands before each program: valgrind, say.

PROGRAMS ?= $(sort $(notdir $(basename $(wildcard tests/core/test_*.c))))
BASE     := -std=c11 -pthread -Wall -Wextra -Wshadow -Werror -Icsrc
HEADERS  := $(wildcard csrc/*.h csrc/*/*.h tests/core/*.h)
COMMA    := ,
OBJECTS  := $(patsubst %.c,$(OUT)/%.o,$(filter-out csrc/python/%,$(sort $(wildcard csrc/*/*.c))))

# What is given to the linker for one program: which system calls of the core are led to the program.
LINK-test_forks := $(addprefix -Wl$(COMMA)--wrap=,open memfd_create close mmap munmap mremap madvise)
LINK-test_last_error := $(addprefix -Wl$(COMMA)--wrap=,mmap mremap)
LINK-test_let_in := $(addprefix -Wl$(COMMA)--wrap=,ndm_i_gate_come_back ndm_i_slots_reserve ftruncate pwritev sync_file_range)
LINK-test_mapping := $(addprefix -Wl$(COMMA)--wrap=,mmap munmap mremap)
LINK-test_adopt := -Wl,--wrap=nanosleep

.PHONY: run $(addprefix run-,$(PROGRAMS))
.DELETE_ON_ERROR:
.SECONDARY:

run: $(addprefix run-,$(PROGRAMS))

$(addprefix run-,$(PROGRAMS)): run-%: $(OUT)/%
	$(RUN) $<

$(OUT)/csrc/%.o: csrc/%.c $(HEADERS)
	@mkdir -p $(@D)
	@$(CC) $(BASE) $(FLAGS) -c -o $@ $<

$(OUT)/%: tests/core/%.c $(OBJECTS) $(HEADERS)
	@$(CC) $(BASE) $(FLAGS) -o $@ $< $(OBJECTS) $(LINK-$*)
