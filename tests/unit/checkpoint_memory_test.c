/* Reading a checkpoint through does not keep it in the process's memory. */
#include "formats/base/rng.h"
#include "formats/checkpoint.h"
#include "tests/test.h"

#include <string.h>
#include <unistd.h>

enum { TENSORS = 40, TENSOR_BYTES = 8 << 20 };

static char folder[] = "/tmp/sida_checkpoint_XXXXXX";

static void write_checkpoint(void) {
    char path[64], *header;
    size_t length;
    snprintf(path, sizeof path, "%s/config.json", folder);
    test_write(path, "{}", 2);
    FILE *text = open_memstream(&header, &length);
    for (int i = 0; i < TENSORS; i++)
        fprintf(text, "%s\"t%02d\":{\"dtype\":\"F32\",\"shape\":[%d],\"data_offsets\":[%d,%d]}",
                i ? "," : "{", i, TENSOR_BYTES / 4, i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES);
    fputc('}', text);
    fclose(text);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    FILE *file = fopen(path, "wb");
    uint64_t size = length;
    uint32_t *block = malloc(TENSOR_BYTES);
    sida_rng rng = sida_rng_seed(1);
    assert_non_null(file);
    fwrite(&size, sizeof size, 1, file);
    fwrite(header, 1, length, file);
    for (int i = 0; i < TENSORS; i++) {
        for (int at = 0; at < TENSOR_BYTES / 4; at++) block[at] = (uint32_t)sida_rng_u64(&rng);
        assert_int_equal(fwrite(block, 1, TENSOR_BYTES, file), TENSOR_BYTES);
    }
    assert_int_equal(fclose(file), 0);
    free(block);
    free(header);
}

/* A line of /proc/self/status, in bytes. */
static size_t status_bytes(const char *key) {
    char line[128];
    size_t kib = 0;
    FILE *file = fopen("/proc/self/status", "r");
    assert_non_null(file);
    while (fgets(line, sizeof line, file))
        if (strncmp(line, key, strlen(key)) == 0) kib = strtoull(line + strlen(key), NULL, 10);
    fclose(file);
    assert_true(kib > 0);
    return kib << 10;
}

static void test_fingerprint(void **state) {
    (void)state;
    const size_t mib = (size_t)1 << 20;
    sida_checkpoint *checkpoint;
    sida_fingerprint first, again;
    assert_int_equal(sida_checkpoint_open(&checkpoint, folder), SIDA_OK);
    size_t before = status_bytes("VmRSS:");
    assert_int_equal(sida_checkpoint_fingerprint(&first, checkpoint), SIDA_OK);
    size_t after = status_bytes("VmRSS:"), most = status_bytes("VmHWM:");
    /* 320 MiB were read; 64 may stay, and one tensor more. */
    if (after > before + 80 * mib || most > before + 80 * mib)
        fail_msg("%zu MiB, then %zu, at most %zu", before / mib, after / mib, most / mib);
    /* What was given back reads the same. */
    const sida_tensor_view *view = sida_checkpoint_find(checkpoint, "t00");
    float *copy = malloc(TENSOR_BYTES);
    memcpy(copy, view->data, TENSOR_BYTES);
    sida_checkpoint_pass(checkpoint, 256 * mib);
    assert_memory_equal(copy, view->data, TENSOR_BYTES);
    free(copy);
    sida_checkpoint_destroy(checkpoint);
    assert_int_equal(sida_checkpoint_open(&checkpoint, folder), SIDA_OK);
    assert_int_equal(sida_checkpoint_fingerprint(&again, checkpoint), SIDA_OK);
    assert_true(sida_fingerprint_equal(first, again));
    sida_checkpoint_destroy(checkpoint);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_fingerprint)};
    char path[64];
    if (!mkdtemp(folder)) return 1;
    write_checkpoint();
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    unlink(path);
    snprintf(path, sizeof path, "%s/config.json", folder);
    unlink(path);
    rmdir(folder);
    return failed;
}
