sida_test(trace_resume SOURCES ${CMAKE_CURRENT_LIST_DIR}/trace_resume.c DEPENDS sida_tracer
  LABELS integration)
