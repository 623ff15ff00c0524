# What sida bench holds its figures against.
sida_test(bench_bound_test
  SOURCES bench_bound_test.c ${CMAKE_SOURCE_DIR}/tools/cli/bench_bound.c
  DEPENDS sida_base LABELS unit)
