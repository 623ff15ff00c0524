sida_test(engine_test SOURCES engine_test.c DEPENDS sida_engine LABELS unit)
# Against libsida.so: what is not exported does not link.
sida_test(engine_public_test SOURCES engine_public_test.c DEPENDS sida_options sida_shared
  LABELS unit)
