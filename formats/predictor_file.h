/* P.h5: a trained predictor, and the trainer's checkpoints (the same, plus optimiser state).
 * Root attributes: format "sida-predictor", version 1, source ("lstm", "table" ...), model and
 * tokenizer (fingerprints), config (JSON: everything that shaped it), plus what a caller sets. What
 * else is in it depends on the source: formats/README.md. */
#ifndef SIDA_FORMATS_PREDICTOR_FILE_H
#define SIDA_FORMATS_PREDICTOR_FILE_H

#include "formats/base/fingerprint.h"
#include "formats/base/status.h"
#include "formats/h5.h"

#include <jansson.h>
#include <stdint.h>

typedef struct sida_predictor_meta {
    sida_fingerprint model, tokenizer;
    char *source;   /* "lstm", ... owned */
    json_t *config; /* owned reference */
} sida_predictor_meta;
void sida_predictor_meta_free(sida_predictor_meta *meta);

sida_status sida_predictor_file_create(sida_h5_file **out, const char *path, sida_h5_kind kind,
                                       const sida_predictor_meta *meta);
/* Opens PREDICTOR or CHECKPOINT and reads the meta data. */
sida_status sida_predictor_file_open(sida_h5_file **out, sida_predictor_meta *meta,
                                     const char *path);

#endif
