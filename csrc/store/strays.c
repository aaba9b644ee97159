/* See strays.h. */
#include "store/strays.h"

__attribute__((noinline, cold)) void ndm_i_strays_note(ndm_i_store *store, uint64_t offset, uint64_t end)
{
    const ndm_i_mapping *mapping = store->file->mapping;
    for (uint64_t stray = offset / NDM_I_HUGE; stray <= (end - 1) / NDM_I_HUGE; stray++) {
        unsigned at = 0;
        while (at < NDM_I_STRAYS && store->strays[at] != stray + 1)
            at++;
        if (at < NDM_I_STRAYS || store->grains.large[stray] == 0)
            continue;
        uint64_t *oldest = &store->strays[store->next_stray++ % NDM_I_STRAYS];
        if (*oldest > 0 && *oldest * NDM_I_HUGE <= mapping->length)
            ndm_i_mapping_forget(mapping, mapping->base + (*oldest - 1) * NDM_I_HUGE, NDM_I_HUGE, true);
        *oldest = stray + 1;
    }
}
