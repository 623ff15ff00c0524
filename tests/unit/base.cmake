sida_test(base_test SOURCES base_test.c DEPENDS sida_base sida_test_support LABELS unit)
