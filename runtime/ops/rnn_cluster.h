/* Inside rnn_cuda.c: SIDA_RNN_CLUSTER, the stack of layers on kernels of our own (lstm_train.h). */
#ifndef SIDA_RUNTIME_OPS_RNN_CLUSTER_H
#define SIDA_RUNTIME_OPS_RNN_CLUSTER_H

#include "runtime/ops/rnn.h"
#include "runtime/ops/train_ops.h"

typedef struct sida_rnn_cluster sida_rnn_cluster;

/* UNSUPPORTED where the device or the width is not served, and in fp32. */
sida_status sida_rnn_cluster_create(sida_rnn_cluster **out, sida_stream *stream,
                                    const sida_rnn_options *options);
void sida_rnn_cluster_destroy(sida_rnn_cluster *rnn); /* takes NULL */
size_t sida_rnn_cluster_bytes(const sida_rnn_cluster *rnn);
int64_t sida_rnn_cluster_items(const sida_rnn_cluster *rnn);
/* Between `space` and PyTorch's tensors, `back` from the first. */
void sida_rnn_cluster_reorder(const sida_rnn_cluster *rnn, float *space,
                              const sida_rnn_weights *weights, bool back);

/* As sida_rnn_…, on the batch that `rows` tells of. */
sida_status sida_rnn_cluster_forward(sida_rnn_cluster *rnn, const sida_row_map *rows,
                                     int32_t sequences, int64_t n, float *y, const float *x,
                                     const float *weights);
sida_status sida_rnn_cluster_backward(sida_rnn_cluster *rnn, const sida_row_map *rows,
                                      int32_t sequences, int64_t n, float *d_x, float *d_weights,
                                      const float *d_y, const float *x, const float *y,
                                      const float *weights);

#endif
