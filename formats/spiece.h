/* A bounded walk over a SentencePiece model (a protobuf message) from outside. libsentencepiece
 * trusts its models: a damaged table of its normaliser makes it read outside of the table, and too
 * many nested symbols overrun its stack. So every model is checked here first, and only the fields
 * that tokenising needs are handed on, written anew. */
#ifndef SIDA_FORMATS_SPIECE_H
#define SIDA_FORMATS_SPIECE_H

#include "formats/base/status.h"

#include <stddef.h>
#include <stdint.h>

/* Limits: the largest known models have 262,144 pieces and 5 MB. */
#define SIDA_SPIECE_MAX_BYTES ((size_t)16 << 20)
#define SIDA_SPIECE_MAX_PIECES (1 << 20)
#define SIDA_SPIECE_MAX_PIECE_BYTES 512

/* Checks `size` bytes and writes the model that libsentencepiece may load to *out (free()).
 * Checked: the wire format, model type unigram or bpe, pieces (count, UTF-8, finite scores, known
 * types, no duplicates left to the library, exactly one unknown, at least one ordinary), and every
 * path through the normaliser's double array. Errors: FORMAT, MEMORY. */
sida_status sida_spiece_check(uint8_t **out, size_t *out_bytes, const void *data, size_t size,
                              const char *name);

#endif
