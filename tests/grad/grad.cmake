sida_test(backward_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/backward_test.c DEPENDS sida_trainer
  LABELS grad)
sida_test(train_golden_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/train_golden_test.c DEPENDS sida_trainer
  LABELS grad)
sida_test(transformer_backward_test
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/transformer_backward_test.c DEPENDS sida_trainer LABELS grad)
sida_test(refine_backward_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/refine_backward_test.c
  DEPENDS sida_trainer LABELS grad)
