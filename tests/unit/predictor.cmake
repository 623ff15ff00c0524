sida_test(predictor_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_test.c DEPENDS sida_predictor
  LABELS unit)
sida_test(predictor_select_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_select_test.c
  DEPENDS sida_predictor LABELS unit)
sida_test(predictor_device_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_device_test.c
  DEPENDS sida_predictor LABELS unit threads)
sida_test(predictor_sources_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_sources_test.c
  DEPENDS sida_trainer LABELS unit)
sida_test(predictor_export_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_export_test.c
  DEPENDS sida_predictor LABELS unit)
sida_test(predictor_oracle_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_oracle_test.c
  DEPENDS sida_trainer LABELS unit)
sida_test(predictor_refine_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_refine_test.c
  DEPENDS sida_predictor LABELS unit)
sida_test(predictor_refined_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_refined_test.c
  DEPENDS sida_predictor LABELS unit)
sida_test(refine_device_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/refine_device_test.c
  DEPENDS sida_predictor LABELS unit)
