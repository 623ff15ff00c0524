sida_test(parity_test SOURCES parity_test.c DEPENDS sida_model LABELS parity)
