/* A model whose config.json or weights are damaged is refused with a message that names the file,
 * or it is a model: then it must run without a fault. Deterministic; the argument is the number of
 * mutations of each kind. */
#include "formats/base/file.h"
#include "runtime/model/model.h"
#include "tests/fuzz/mutate.h"
#include "tests/test.h"

#include <unistd.h>

static const char *const source = "tests/parity/base";
static char folder[] = "/tmp/sida-model-fuzz-XXXXXX";
static char config_path[64], weights_path[64];
static int rounds = 300;

static void write_file(const char *path, blob bytes) {
    test_write(path, bytes.data, bytes.bytes);
}

static blob read_file(const char *name) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", source, name);
    test_bytes bytes = test_read(path);
    return (blob){bytes.data, bytes.size};
}

/* Encodes and decodes a few tokens. */
static sida_status use(sida_model *model) {
    static const int64_t offsets[] = {0, 5, 6};
    static const int32_t ids[] = {3, 4, 5, 6, 1, 1};
    static const int64_t step_offsets[] = {0, 1, 2};
    static const int32_t step_ids[] = {0, 0};
    const sida_ragged input = {2, offsets, ids}, step = {2, step_offsets, step_ids};
    const sida_run_limits limits = {2, 6, 2, 4, 0};
    const sida_model_info *info = sida_model_get_info(model);
    sida_resident *resident = NULL;
    sida_run *run = NULL;
    float *logits = NULL;
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_resident_create(&resident, model));
    SIDA_TRY(sida_run_create(&run, model, &limits));
    const sida_moe_driver *driver = sida_resident_driver(resident, NULL, NULL, NULL);
    SIDA_TRY(sida_run_encode(run, &input, driver));
    SIDA_TRY(sida_run_decode(run, &step, driver));
    logits = malloc((size_t)info->vocabulary * 2 * sizeof *logits);
    SIDA_TRY(sida_run_read_logits(run, 0, 2, logits));
out:
    free(logits);
    sida_run_destroy(run);
    sida_resident_destroy(resident);
    return status;
}

/* Opens the folder as it is; true when it was a model. */
static bool try_model(void) {
    sida_backend *backend;
    sida_model *model = NULL;
    assert_int_equal(sida_backend_create_cpu(&backend, NULL), SIDA_OK);
    sida_status status = sida_model_open(&model, backend, folder);
    if (status != SIDA_OK && !strstr(sida_last_message(), folder))
        fail_msg("no file name in: %s", sida_last_message());
    if (status == SIDA_OK) {
        status = use(model);
        /* NaN in weights is not a fault of the program; a refusal must still be told. */
        if (status != SIDA_OK) assert_true(sida_last_message()[0]);
    }
    sida_model_destroy(model);
    sida_backend_destroy(backend);
    return status == SIDA_OK;
}

/* Puts another number, or what is none, where a number stands. */
static blob change_number(sida_rng *rng, const blob *seed) {
    static const char *const numbers[] = {"0",          "1",
                                          "-1",         "2",
                                          "3",          "7",
                                          "64",         "1e99",
                                          "0.5",        "true",
                                          "null",       "\"4\"",
                                          "[]",         "65536",
                                          "2147483648", "4096",
                                          "9999999999", "{}",
                                          "33",         "1e-6",
                                          "1e-99",      "\"gated-gelu\""};
    size_t starts[256], count = 0;
    for (size_t i = 1; i < seed->bytes && count < 256; i++)
        if (seed->data[i] >= '0' && seed->data[i] <= '9' && seed->data[i - 1] == ' ')
            starts[count++] = i;
    size_t at = starts[sida_rng_below(rng, (uint32_t)count)], end = at;
    while (end < seed->bytes && seed->data[end] != ',' && seed->data[end] != '\n') end++;
    const char *number = numbers[sida_rng_below(rng, sizeof numbers / sizeof *numbers)];
    size_t length = strlen(number);
    blob out = {malloc(seed->bytes + length), 0};
    memcpy(out.data, seed->data, at);
    memcpy(out.data + at, number, length);
    memcpy(out.data + at + length, seed->data + end, seed->bytes - end);
    out.bytes = at + length + seed->bytes - end;
    return out;
}

static void damage(const char *what, const char *path, const char *name,
                   blob (*change)(sida_rng *, const blob *)) {
    sida_rng rng = sida_rng_seed(7);
    blob seed = read_file(name);
    int models = 0;
    for (int i = 0; i < rounds; i++) {
        blob input = change(&rng, &seed);
        write_file(path, input);
        free(input.data);
        models += try_model();
    }
    write_file(path, seed);
    free(seed.data);
    assert_true(try_model());
    print_message("%s: %d of %d refused\n", what, rounds - models, rounds);
    assert_true(models < rounds);
}

static void config_numbers(void **state) {
    (void)state;
    damage("config.json, numbers", config_path, "config.json", change_number);
}

static void config_bytes(void **state) {
    (void)state;
    damage("config.json, bytes", config_path, "config.json", mutate);
}

static void weights(void **state) {
    (void)state;
    damage("model.safetensors", weights_path, "model.safetensors", mutate);
}

int main(int argc, char **argv) {
    if (argc > 1) rounds = atoi(argv[1]);
    if (!mkdtemp(folder)) return 1;
    snprintf(config_path, sizeof config_path, "%s/config.json", folder);
    snprintf(weights_path, sizeof weights_path, "%s/model.safetensors", folder);
    blob config = read_file("config.json"), bytes = read_file("model.safetensors");
    write_file(config_path, config);
    write_file(weights_path, bytes);
    free(config.data);
    free(bytes.data);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(config_numbers),
        cmocka_unit_test(config_bytes),
        cmocka_unit_test(weights),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(config_path);
    unlink(weights_path);
    rmdir(folder);
    return failed;
}
