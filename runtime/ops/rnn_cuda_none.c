/* Built without cuDNN's header: no LSTM can be made, so nothing else is ever called. */
#include "runtime/ops/rnn.h"

#include <stdlib.h>

bool sida_rnn_built(void) {
    return false;
}

sida_status sida_rnn_create(sida_rnn **out, sida_stream *stream, const sida_rnn_options *options) {
    (void)stream;
    (void)options;
    *out = NULL;
    return sida_fail(SIDA_ERROR_UNSUPPORTED,
                     "this build has no cuDNN: install its header and build again, or train with "
                     "--device cpu");
}

void sida_rnn_destroy(sida_rnn *rnn) {
    (void)rnn;
}

size_t sida_rnn_bytes(const sida_rnn *rnn) {
    (void)rnn;
    abort();
}
int64_t sida_rnn_weight_items(const sida_rnn *rnn) {
    (void)rnn;
    abort();
}
void sida_rnn_pack(const sida_rnn *rnn, float *space, const sida_rnn_weights *weights) {
    (void)rnn, (void)space, (void)weights;
    abort();
}
void sida_rnn_unpack(const sida_rnn *rnn, const sida_rnn_weights *weights, const float *space) {
    (void)rnn, (void)weights, (void)space;
    abort();
}
sida_status sida_rnn_set_lengths(sida_rnn *rnn, const int32_t *lengths, int32_t sequences) {
    (void)rnn, (void)lengths, (void)sequences;
    abort();
}
void sida_rnn_set_rows(sida_rnn *rnn, const struct sida_row_map *rows, int32_t sequences) {
    (void)rnn;
    (void)rows;
    (void)sequences;
    abort();
}
int64_t sida_rnn_rows(const sida_rnn *rnn) {
    (void)rnn;
    abort();
}
int32_t sida_rnn_longest(const sida_rnn *rnn) {
    (void)rnn;
    abort();
}
void sida_rnn_steps(const sida_rnn *rnn, int32_t *step) {
    (void)rnn, (void)step;
    abort();
}
sida_status sida_rnn_forward(sida_rnn *rnn, float *y, const float *x, const float *weights) {
    (void)rnn, (void)y, (void)x, (void)weights;
    abort();
}
sida_status sida_rnn_backward(sida_rnn *rnn, float *d_x, float *d_weights, const float *d_y,
                              const float *x, const float *y, const float *weights) {
    (void)rnn, (void)d_x, (void)d_weights, (void)d_y, (void)x, (void)y, (void)weights;
    abort();
}
