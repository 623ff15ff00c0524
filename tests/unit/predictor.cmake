sida_test(predictor_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_test.c DEPENDS sida_predictor
  LABELS unit)
sida_test(predictor_device_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_device_test.c
  DEPENDS sida_predictor LABELS unit threads)
sida_test(predictor_sources_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_sources_test.c
  DEPENDS sida_trainer LABELS unit)
sida_test(predictor_export_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_export_test.c
  DEPENDS sida_predictor LABELS unit)
sida_test(predictor_oracle_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_oracle_test.c
  DEPENDS sida_trainer LABELS unit)
