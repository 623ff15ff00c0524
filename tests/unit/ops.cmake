sida_test(ops_test SOURCES ops_test.c DEPENDS sida_ops LABELS unit)
sida_test(ops_product_test SOURCES ops_product_test.c DEPENDS sida_ops LABELS unit)
sida_test(model_config_test SOURCES model_config_test.c DEPENDS sida_model LABELS unit)
sida_test(model_run_test SOURCES model_run_test.c DEPENDS sida_model LABELS unit)
