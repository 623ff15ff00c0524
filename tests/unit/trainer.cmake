sida_test(trainer_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/trainer_test.c DEPENDS sida_trainer
  LABELS unit)
