/* In builds without CUDA. */
#include "runtime/backend/backend.h"

bool sida_cuda_present(void) {
    return false;
}

sida_status sida_backend_create_cuda(sida_backend **out, const sida_cuda_options *options) {
    (void)options;
    *out = NULL;
    return sida_fail(SIDA_ERROR_UNSUPPORTED,
                     "device cuda: this program was built without CUDA; use --device cpu");
}
