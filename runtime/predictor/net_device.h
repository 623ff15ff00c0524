/* The network's inference on the device of a back-end: what the host's pass does, through
 * the back-end's ops and streams. Memory for given limits is taken once; running takes none.
 *
 * Two lanes, each a stream with a workspace and a lock: one for a batch's encoder and its first
 * decoder step, which are computed ahead, and one for the steps after that, which somebody waits
 * for. So two threads may call at once, on states of their own. */
#ifndef SIDA_RUNTIME_PREDICTOR_NET_DEVICE_H
#define SIDA_RUNTIME_PREDICTOR_NET_DEVICE_H

#include "runtime/ops/ops.h"
#include "runtime/predictor/hash_source.h"
#include "runtime/predictor/refine.h"

typedef struct sida_net_device sida_net_device;
/* Of one batch: what the decoder attends to of the encoder, and its own state and memory. */
typedef struct sida_net_device_state sida_net_device_state;

/* False where the back-end lacks an op: the network stays on the host then. */
bool sida_net_device_possible(const sida_backend *backend, const sida_net_config *config);

/* Copies the parameters. refine: NULL for none. embedding: on the device, borrowed. Errors: those
 * of taking memory. */
sida_status sida_net_device_create(sida_net_device **out, const sida_net *net,
                                   const sida_refine *refine, sida_backend *backend,
                                   sida_weight embedding, const sida_hash_limits *limits);
/* All states must have been given back. Takes NULL. */
void sida_net_device_destroy(sida_net_device *device);
/* All that it takes of the device. */
size_t sida_net_device_bytes(const sida_net_device *device);

/* One of limits.states; ARGUMENT when all are taken. */
sida_status sida_net_device_take(sida_net_device *device, sida_net_device_state **out);
void sida_net_device_give(sida_net_device_state *state); /* takes NULL */

/* The tables of a new batch, and of the next tokens of its sequences. ARGUMENT beyond the limits
 * and for a step of another batch, FORMAT for an id outside the embedding and for scores that are
 * not finite. */
sida_status sida_net_device_encode(sida_net_device_state *state, const sida_ragged *input,
                                   int32_t k, sida_hash_table *out);
sida_status sida_net_device_decode(sida_net_device_state *state, const sida_ragged *step, int32_t k,
                                   sida_hash_table *out);
/* As sida_hash_refine(), on the lane of steps. */
sida_status sida_net_device_refine_table(sida_net_device_state *state, int side, int32_t layer,
                                         const int32_t *experts, int32_t top_k, int32_t k,
                                         sida_hash_table *out);

#endif
