/* config.json of switch_transformers: what is accepted, which blocks are sparse, and that
 * everything else is refused by name. */
#include "runtime/model/family.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static const char base[] = "{\"vocab_size\": 100, \"d_model\": 32, \"d_kv\": 8, \"num_heads\": 4,"
                           "\"d_ff\": 64, \"num_layers\": 12, \"num_decoder_layers\": 12,"
                           "\"num_sparse_encoder_layers\": 6, \"num_sparse_decoder_layers\": 6,"
                           "\"num_experts\": 8, \"expert_capacity\": 64}";

/* The base config with members of `changes` put over it (null removes one). */
static sida_status configure(sida_family_config *out, const char *changes) {
    json_t *config = json_loads(base, 0, NULL), *over = json_loads(changes, 0, NULL), *value;
    const char *key;
    assert_non_null(config);
    assert_non_null(over);
    json_object_foreach(over, key, value) {
        if (json_is_null(value))
            json_object_del(config, key);
        else
            json_object_set(config, key, value);
    }
    memset(out, 0, sizeof *out);
    sida_status status = sida_family_switch_transformers.configure(out, config, "x/config.json");
    json_decref(config);
    json_decref(over);
    return status;
}

static void expect_sparse(const char *changes, int side, const char *want) {
    sida_family_config config;
    assert_int_equal(configure(&config, changes), SIDA_OK);
    assert_int_equal(config.info.layers[side], strlen(want));
    int32_t count = 0;
    for (size_t i = 0; want[i]; i++) {
        assert_int_equal(config.sparse[side][i], want[i] == '1');
        count += want[i] == '1';
    }
    assert_int_equal(config.info.moe_layers[side], count);
    sida_family_config_free(&config);
}

static void test_sparse_blocks(void **state) {
    (void)state;
    expect_sparse("{}", SIDA_ENCODER, "010101010101");
    expect_sparse("{\"num_sparse_decoder_layers\": 3}", SIDA_DECODER, "010001000100");
    expect_sparse("{\"num_sparse_encoder_layers\": 12}", SIDA_ENCODER, "111111111111");
    expect_sparse("{\"num_sparse_encoder_layers\": 5}", SIDA_ENCODER, "010101010101");
    /* A stored step wins; 0: none. */
    expect_sparse("{\"decoder_sparse_step\": 4}", SIDA_DECODER, "010001000100");
    expect_sparse("{\"decoder_sparse_step\": 0}", SIDA_DECODER, "000000000000");
    expect_sparse("{\"num_sparse_decoder_layers\": 0, \"decoder_sparse_step\": 0}", SIDA_DECODER,
                  "000000000000");
    /* More sparse layers than layers: a step of 0. */
    expect_sparse("{\"num_sparse_decoder_layers\": 13}", SIDA_DECODER, "000000000000");
    /* As Transformers does it: no sparse layers and no step give one. */
    expect_sparse("{\"num_sparse_decoder_layers\": 0}", SIDA_DECODER, "010000000000");
    expect_sparse("{\"num_decoder_layers\": null}", SIDA_DECODER, "010101010101");
}

static void test_fields(void **state) {
    (void)state;
    sida_family_config config;
    assert_int_equal(configure(&config, "{}"), SIDA_OK);
    assert_int_equal(config.info.sites, 12);
    assert_int_equal(config.info.top_k, 1);
    assert_int_equal(config.info.eos, 1);
    assert_true(config.tied);
    assert_false(config.gated);
    sida_family_config_free(&config);
    assert_int_equal(configure(&config, "{\"feed_forward_proj\": \"gated-gelu\","
                                        "\"dense_act_fn\": \"gelu_new\","
                                        "\"tie_word_embeddings\": false}"),
                     SIDA_OK);
    assert_true(config.gated);
    assert_false(config.tied);
    assert_int_equal(config.info.expert.activation, SIDA_ACT_GELU_NEW);
    sida_family_config_free(&config);
}

typedef struct refusal {
    const char *changes;
    sida_status status;
    const char *names; /* in the message */
} refusal;

static void test_refusals(void **state) {
    (void)state;
    static const refusal cases[] = {
        {"{\"d_model\": null}", SIDA_ERROR_FORMAT, "d_model is missing"},
        {"{\"d_model\": \"32\"}", SIDA_ERROR_FORMAT, "d_model"},
        {"{\"d_model\": 32.5}", SIDA_ERROR_FORMAT, "d_model"},
        {"{\"d_model\": 0}", SIDA_ERROR_FORMAT, "d_model"},
        {"{\"d_model\": 9999999999}", SIDA_ERROR_FORMAT, "d_model"},
        {"{\"vocab_size\": 1}", SIDA_ERROR_FORMAT, "vocab_size"},
        {"{\"d_kv\": 257}", SIDA_ERROR_FORMAT, "d_kv"},
        {"{\"num_heads\": -1}", SIDA_ERROR_FORMAT, "num_heads"},
        {"{\"d_ff\": true}", SIDA_ERROR_FORMAT, "d_ff"},
        {"{\"num_layers\": 100000}", SIDA_ERROR_FORMAT, "num_layers"},
        {"{\"num_decoder_layers\": 0}", SIDA_ERROR_FORMAT, "num_decoder_layers"},
        {"{\"num_experts\": 1000000}", SIDA_ERROR_FORMAT, "num_experts"},
        {"{\"expert_capacity\": 0}", SIDA_ERROR_FORMAT, "expert_capacity"},
        {"{\"num_sparse_encoder_layers\": -2}", SIDA_ERROR_FORMAT, "num_sparse_encoder_layers"},
        {"{\"encoder_sparse_step\": [2]}", SIDA_ERROR_FORMAT, "encoder_sparse_step"},
        {"{\"eos_token_id\": 100}", SIDA_ERROR_FORMAT, "special token"},
        {"{\"relative_attention_num_buckets\": 3}", SIDA_ERROR_FORMAT, "num_buckets"},
        {"{\"relative_attention_max_distance\": 16}", SIDA_ERROR_UNSUPPORTED, "distance 16"},
        {"{\"layer_norm_epsilon\": -1}", SIDA_ERROR_FORMAT, "layer_norm_epsilon"},
        {"{\"tie_word_embeddings\": 1}", SIDA_ERROR_FORMAT, "tie_word_embeddings"},
        {"{\"router_bias\": true}", SIDA_ERROR_UNSUPPORTED, "router_bias"},
        {"{\"router_dtype\": \"bfloat16\"}", SIDA_ERROR_UNSUPPORTED, "router_dtype"},
        {"{\"router_type\": \"scatter\"}", SIDA_ERROR_UNSUPPORTED, "router_type"},
        {"{\"num_selected_experts\": 2}", SIDA_ERROR_UNSUPPORTED, "num_selected_experts"},
        {"{\"is_encoder_decoder\": false}", SIDA_ERROR_UNSUPPORTED, "is_encoder_decoder"},
        {"{\"feed_forward_proj\": \"gelu\"}", SIDA_ERROR_UNSUPPORTED, "feed_forward_proj gelu"},
        {"{\"feed_forward_proj\": \"gated-tanh\"}", SIDA_ERROR_UNSUPPORTED, "gated-tanh"},
        {"{\"feed_forward_proj\": 7}", SIDA_ERROR_FORMAT, "feed_forward_proj"},
        {"{\"feed_forward_proj\": \"relu\", \"is_gated_act\": true}", SIDA_ERROR_FORMAT,
         "is_gated_act"},
        {"{\"dense_act_fn\": \"swish\"}", SIDA_ERROR_UNSUPPORTED, "dense_act_fn"},
        {"{\"encoder_sparse_step\": 0, \"decoder_sparse_step\": 0}", SIDA_ERROR_UNSUPPORTED,
         "no MoE layer"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        sida_family_config config;
        sida_status status = configure(&config, cases[i].changes);
        sida_family_config_free(&config);
        if (status != cases[i].status) fail_msg("%s: status %d", cases[i].changes, status);
        if (!strstr(sida_last_message(), cases[i].names) ||
            !strstr(sida_last_message(), "x/config.json"))
            fail_msg("%s: %s", cases[i].changes, sida_last_message());
    }
}

static void test_unknown_family(void **state) {
    (void)state;
    assert_null(sida_family_find("t5"));
    assert_ptr_equal(sida_family_find("switch_transformers"), &sida_family_switch_transformers);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sparse_blocks),
        cmocka_unit_test(test_fields),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_unknown_family),
    };
    return cmocka_run_group_tests_name("model_config", tests, NULL, NULL);
}
