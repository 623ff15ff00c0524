sida_test(backend_test SOURCES backend_test.c DEPENDS sida_backend LABELS unit threads)
