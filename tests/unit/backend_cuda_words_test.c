/* What is said where no CUDA device can be had; needs none. */
#include "runtime/backend/backend_cuda.h"
#include "tests/test.h"

#include <string.h>

static void expect(cudaError_t code, int driver, const char *words) {
    assert_int_equal(sida_cuda_absent(code, driver), SIDA_ERROR_DEVICE);
    if (!strstr(sida_last_message(), words) || !strstr(sida_last_message(), "use --device cpu"))
        fail_msg("'%s' says not '%s', or not what to do", sida_last_message(), words);
}

static void test_absent(void **state) {
    (void)state;
    char wanted[64];
    snprintf(wanted, sizeof wanted, "knows CUDA 11.4, this program needs %d.%d: update the driver",
             CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    expect(cudaErrorInsufficientDriver, 11040, wanted);
    expect(cudaErrorInsufficientDriver, 0, "no NVIDIA driver is installed");
    expect(cudaErrorNoDevice, 12040, "no GPU is present or visible");
    expect(cudaSuccess, 12040, "CUDA_VISIBLE_DEVICES");
    expect(cudaErrorSystemDriverMismatch, 12040, cudaGetErrorString(cudaErrorSystemDriverMismatch));
}

/* What a call says depends on what went wrong. */
static void test_calls(void **state) {
    (void)state;
    static const struct {
        cudaError_t code;
        const char *words;
    } cases[] = {
        {cudaErrorMemoryAllocation, "smaller budget"},
        {cudaErrorNoKernelImageForDevice, "CMAKE_CUDA_ARCHITECTURES"},
        {cudaErrorIllegalAddress, "start again"},
        {cudaErrorECCUncorrectable, "nvidia-smi"},
        {cudaErrorUnknown, "start again"},
    };
    assert_int_equal(sida_cuda_check(cudaSuccess, "cudaFree(x)"), SIDA_OK);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_equal(sida_cuda_check(cases[i].code, "cudaMemcpyAsync(a, b)"),
                         SIDA_ERROR_DEVICE);
        assert_non_null(strstr(sida_last_message(), "cuda: cudaMemcpyAsync: "));
        assert_non_null(strstr(sida_last_message(), cases[i].words));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_absent),
        cmocka_unit_test(test_calls),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
