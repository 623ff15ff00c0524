/* Hash sources that are counted or drawn from a trace in one go, without training. */
#ifndef SIDA_TRAINER_FIT_H
#define SIDA_TRAINER_FIT_H

#include "runtime/predictor/sources.h"
#include "trainer/train.h"

/* "popular, table, bigram, layer-hash": for messages. */
extern const char sida_fit_sources[];
/* Whether sida_fit() knows it. */
bool sida_fit_known(const char *source);

/* A source in memory: of a name above, or "layer-hash" of a kind and a seed. ARGUMENT for another
 * name. */
sida_status sida_fit_source(sida_hash_source **out, const char *source, sida_layer_hash hash,
                            int64_t seed, const sida_dataset *data);

/* What sida_train() does for these sources: of the options it reads trace, output, source, hash and
 * seed, and valid, which may be NULL: then nothing is measured. P.h5's config holds the fingerprint
 * of the trace; same trace and options, same bytes. *summary as sida_train()'s, without what is of
 * epochs and steps. */
sida_status sida_fit(const sida_train_options *options, json_t **summary);

#endif
