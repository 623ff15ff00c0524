/* A Hugging Face model directory: config.json, model.safetensors or shards with their index,
 * spiece.model. Weights stay mapped, nothing is copied. */
#ifndef SIDA_FORMATS_CHECKPOINT_H
#define SIDA_FORMATS_CHECKPOINT_H

#include "formats/base/fingerprint.h"
#include "formats/base/status.h"
#include "formats/safetensors.h"

#include <jansson.h>

typedef struct sida_checkpoint sida_checkpoint;

/* Opens config.json and every weight file: model.safetensors, else the shards that
 * model.safetensors.index.json names (plain names in this folder; its weight_map decides which
 * tensors there are). Duplicate JSON keys are refused. Errors: IO, FORMAT (each names the file). */
sida_status sida_checkpoint_open(sida_checkpoint **out, const char *folder);
void sida_checkpoint_destroy(sida_checkpoint *checkpoint);

const char *sida_checkpoint_folder(const sida_checkpoint *checkpoint);
/* The parsed config.json (an object). */
const json_t *sida_checkpoint_config(const sida_checkpoint *checkpoint);

/* A tensor by its name; NULL when there is none. */
const sida_tensor_view *sida_checkpoint_find(const sida_checkpoint *checkpoint, const char *name);
/* The same, but a missing tensor or another shape is a FORMAT error that names both shapes.
 * `rank` extents follow as int64_t array. */
sida_status sida_checkpoint_tensor(const sida_tensor_view **out, const sida_checkpoint *checkpoint,
                                   const char *name, int rank, const int64_t *shape);

/* The number of tensors, and the i-th in the order of their names. */
size_t sida_checkpoint_count(const sida_checkpoint *checkpoint);
const sida_tensor_view *sida_checkpoint_at(const sida_checkpoint *checkpoint, size_t index);

/* Tells that `bytes` of tensors have been read and will hardly be again: every 64 MiB of them the
 * process's pages of all weight files go, so that copying a model out of its files takes no room
 * for both. Views stay valid. Not from two threads at once. */
void sida_checkpoint_pass(sida_checkpoint *checkpoint, size_t bytes);

/* Over config.json's bytes and every tensor's name, type, shape and bytes in the order of names:
 * resharding keeps it. Reads all weights (about 10 GB/s); computed on the first call, which is not
 * safe to make from two threads at once. */
sida_status sida_checkpoint_fingerprint(sida_fingerprint *out, sida_checkpoint *checkpoint);

#endif
