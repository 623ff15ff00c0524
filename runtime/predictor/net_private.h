/* What the two kinds of network share of a pass, and networks and refinements of their tensors. */
#ifndef SIDA_RUNTIME_PREDICTOR_NET_PRIVATE_H
#define SIDA_RUNTIME_PREDICTOR_NET_PRIVATE_H

#include "runtime/predictor/net.h"

/* What storage[] holds. KEPT: an LSTM's attention's probabilities; on a Transformer's encoder what
 * the decoder reads of it. */
enum { SIDA_NET_STORE_FLOATS, SIDA_NET_STORE_KEPT, SIDA_NET_STORE_LONGS, SIDA_NET_STORE_INTS };

/* Room for `items` in storage[which]; the old contents do not matter. */
sida_status sida_net_pass_reserve(sida_net_activations *a, int which, size_t items, size_t size);

/* The integers of a side, all 0. Longs: a->offsets [sequences + 1], then [sequences] each of
 * k_start and p_start of self-attention and of cross-attention. Ints, [sequences] each: q_count,
 * q_position, k_count of self-attention and of cross-attention. */
sida_status sida_net_pass_lay_out_integers(sida_net_pass *pass, int side);

/* The product of inference, or of training. */
sida_status sida_net_pass_apply(const sida_net_pass *pass, float *y, const float *x, int64_t n,
                                const sida_net_linear *layer, sida_epilogue epilogue);

/* A Transformer's part of sida_net_encode and sida_net_decode. The decoder's state has room for
 * this step; its counts are brought up to date. */
sida_status sida_net_transformer_run(sida_net_pass *pass, int side, sida_weight embedding,
                                     const sida_ragged *input);

/* --- tensors: rank 1 or 2, data set but for check */

/* Uniform within centre ± bound, drawn in the order of the tensors. */
void sida_net_tensors_initialise(const sida_net_tensor *tensors, int32_t count, uint64_t seed);
/* /tensors/NAME. check: FORMAT for missing ones and other shapes; read: and for values that are not
 * finite. Check before memory is taken for them: a small file must not make us take much. */
sida_status sida_net_tensors_write(sida_h5_file *file, const sida_net_tensor *tensors,
                                   int32_t count);
sida_status sida_net_tensors_check(sida_h5_file *file, const sida_net_tensor *tensors,
                                   int32_t count);
sida_status sida_net_tensors_read(sida_h5_file *file, const sida_net_tensor *tensors,
                                  int32_t count);

#endif
