sida_test(identity_test
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/identity_rig.c ${CMAKE_CURRENT_LIST_DIR}/identity_test.c
  DEPENDS sida_engine LABELS integration threads)
sida_test(identity_refine_test
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/identity_rig.c
    ${CMAKE_CURRENT_LIST_DIR}/identity_refine_test.c
  DEPENDS sida_engine LABELS integration threads)
sida_test(identity_run_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/identity_run_test.c
  DEPENDS sida_api LABELS integration threads)
