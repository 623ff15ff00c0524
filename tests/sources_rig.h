/* Asking a hash source: a batch's state with the table of its last call. */
#ifndef SIDA_TESTS_SOURCES_RIG_H
#define SIDA_TESTS_SOURCES_RIG_H

#include "tests/test.h"

#include "runtime/predictor/sources.h"
#include "trainer/dataset.h"

#include <string.h>

static inline void ok(sida_status status) {
    if (status != SIDA_OK) fail_msg("%s", sida_last_message());
}

static inline void refused(sida_status status, sida_status code, const char *words) {
    if (status != code || !strstr(sida_last_message(), words))
        fail_msg("%d instead of %d, '%s' does not say '%s'", status, code, sida_last_message(),
                 words);
}

typedef struct asked {
    sida_hash_state *state;
    sida_hash_table table;
} asked;

static inline asked ask(const sida_hash_source *source, const sida_ragged *input, int32_t k) {
    asked a = {0};
    ok(sida_hash_state_create(source, &a.state));
    ok(sida_hash_encode(source, a.state, input, k, &a.table));
    return a;
}

static inline void forget(const sida_hash_source *source, asked *a) {
    sida_hash_state_destroy(source, a->state);
    sida_hash_table_free(&a->table);
}

static inline sida_ragged sequence(const sida_dataset *data, int side, int32_t s,
                                   int64_t offsets[2]) {
    const sida_dataset_side *from = &data->sides[side];
    offsets[0] = 0;
    offsets[1] = from->offsets[s + 1] - from->offsets[s];
    return (sida_ragged){1, offsets, from->ids + from->offsets[s]};
}

#endif
