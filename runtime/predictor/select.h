/* From scores to the rows of a hash table. */
#ifndef SIDA_RUNTIME_PREDICTOR_SELECT_H
#define SIDA_RUNTIME_PREDICTOR_SELECT_H

#include "runtime/predictor/hash_source.h"

/* Row `row` of the table, one layer: the k highest of scores [E] and their softmax over all E; ties
 * to the lower id. scratch: [E]. False when a score is not finite. */
bool sida_select_logits(sida_hash_table *out, int64_t row, int32_t layer, const float *scores,
                        int32_t experts, uint64_t *scratch);
/* The same where the scores are weights >= 0 with a positive sum: α is their share. */
bool sida_select_weights(sida_hash_table *out, int64_t row, int32_t layer, const float *scores,
                         int32_t experts, uint64_t *scratch);

/* FORMAT: what is said of scores that are not finite. */
sida_status sida_select_not_finite(void);

#endif
