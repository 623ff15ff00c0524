sida_test(predictor_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_test.c DEPENDS sida_predictor
  LABELS unit)
sida_test(predictor_device_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/predictor_device_test.c
  DEPENDS sida_predictor LABELS unit threads)
