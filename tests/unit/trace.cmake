sida_test(model_trace_test SOURCES model_trace_test.c DEPENDS sida_model LABELS unit)
