/* One safetensors file: names, types and shapes over mapped bytes; and writing one.
 * Format: u64 little-endian header length, JSON header, tensor bytes. */
#ifndef SIDA_FORMATS_SAFETENSORS_H
#define SIDA_FORMATS_SAFETENSORS_H

#include "formats/base/status.h"
#include "formats/dtype.h"

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

#define SIDA_TENSOR_MAX_RANK 4

typedef struct sida_tensor_view {
    const char *name; /* owned by the container */
    sida_dtype dtype;
    int rank;
    int64_t shape[SIDA_TENSOR_MAX_RANK];
    const void *data; /* row-major; may be unaligned within the file */
    size_t bytes;
} sida_tensor_view;

typedef struct sida_safetensors sida_safetensors;

/* Parses `size` bytes that stay mapped while the container lives. `name` is for messages.
 * Checks: header within the file, JSON, known dtypes, non-negative shapes whose product matches the
 * byte range, ranges inside the file, no overlaps, no name twice, rank <= 4. The header is limited
 * to 64 MiB. Errors: FORMAT, MEMORY. */
sida_status sida_safetensors_parse(sida_safetensors **out, const void *data, size_t size,
                                   const char *name);
void sida_safetensors_destroy(sida_safetensors *file);

size_t sida_safetensors_count(const sida_safetensors *file);
const sida_tensor_view *sida_safetensors_at(const sida_safetensors *file, size_t index);
/* __metadata__: an object of strings, borrowed; NULL where the file has none. */
const json_t *sida_safetensors_metadata(const sida_safetensors *file);

/* Writes the tensors in their order, contiguous, behind a header that ends at a multiple of 8
 * bytes. metadata: an object of strings, or NULL. The file is there complete or not at all; same
 * calls, same bytes. Errors: IO, MEMORY; ARGUMENT for a name twice or metadata that is no string.
 */
sida_status sida_safetensors_write(const char *path, const sida_tensor_view *tensors, size_t count,
                                   const json_t *metadata);

#endif
