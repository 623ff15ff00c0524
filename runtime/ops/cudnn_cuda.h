/* cuDNN, loaded when the first LSTM is made: it is large, and only training wants it. */
#ifndef SIDA_RUNTIME_OPS_CUDNN_CUDA_H
#define SIDA_RUNTIME_OPS_CUDNN_CUDA_H

#include "formats/base/status.h"

#include <cudnn.h>

/* The functions that rnn_cuda.c calls: a member and cuDNN's name of each. */
#define SIDA_CUDNN_FUNCTIONS(F)                                                                    \
    F(version, cudnnGetVersion)                                                                    \
    F(status_string, cudnnGetErrorString)                                                          \
    F(create, cudnnCreate)                                                                         \
    F(destroy, cudnnDestroy)                                                                       \
    F(set_stream, cudnnSetStream)                                                                  \
    F(create_tensor, cudnnCreateTensorDescriptor)                                                  \
    F(destroy_tensor, cudnnDestroyTensorDescriptor)                                                \
    F(set_tensor, cudnnSetTensorNdDescriptor)                                                      \
    F(get_tensor, cudnnGetTensorNdDescriptor)                                                      \
    F(create_dropout, cudnnCreateDropoutDescriptor)                                                \
    F(destroy_dropout, cudnnDestroyDropoutDescriptor)                                              \
    F(set_dropout, cudnnSetDropoutDescriptor)                                                      \
    F(create_rnn, cudnnCreateRNNDescriptor)                                                        \
    F(destroy_rnn, cudnnDestroyRNNDescriptor)                                                      \
    F(set_rnn, cudnnSetRNNDescriptor_v8)                                                           \
    F(create_data, cudnnCreateRNNDataDescriptor)                                                   \
    F(destroy_data, cudnnDestroyRNNDataDescriptor)                                                 \
    F(set_data, cudnnSetRNNDataDescriptor)                                                         \
    F(space_sizes, cudnnGetRNNTempSpaceSizes)                                                      \
    F(weight_bytes, cudnnGetRNNWeightSpaceSize)                                                    \
    F(weight_parameters, cudnnGetRNNWeightParams)                                                  \
    F(forward, cudnnRNNForward)                                                                    \
    F(backward_data, cudnnRNNBackwardData_v8)                                                      \
    F(backward_weights, cudnnRNNBackwardWeights_v8)

/* Under cuDNN's own types. */
typedef struct sida_cudnn {
#define SIDA_CUDNN_MEMBER(member, name) __typeof__(name) *member;
    SIDA_CUDNN_FUNCTIONS(SIDA_CUDNN_MEMBER)
#undef SIDA_CUDNN_MEMBER
} sida_cudnn;

/* Loads the major version that this was compiled against. DEVICE when it is not there. Any
 * thread. */
sida_status sida_cudnn_load(const sida_cudnn **out);

#endif
