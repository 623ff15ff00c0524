sida_test(synthetic_test SOURCES synthetic_test.c DEPENDS sida_model LABELS unit)
