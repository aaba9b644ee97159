/* Sleep until a word changes: threads of one process, or of several that map the same page. */
#ifndef NDM_FUTEX_H
#define NDM_FUTEX_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* Sleep while the word is `seen`, at most that long. false: a signal came. Any other return may be early: look again. */
bool ndm_i_futex_wait(const _Atomic uint32_t *word, uint32_t seen, uint64_t nanoseconds);

/* Wake all that sleep on the word. */
void ndm_i_futex_wake(const _Atomic uint32_t *word);

#endif
