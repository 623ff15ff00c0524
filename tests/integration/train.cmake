sida_test(train_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/train_test.c DEPENDS sida_trainer
  LABELS integration)
