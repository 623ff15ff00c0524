sida_test(trainer_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/trainer_test.c DEPENDS sida_trainer
  LABELS unit)
sida_test(learner_test
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/learner_test.c ../streams_host.c ../train_ops_host.c
    ../train_rnn_host.c
  DEPENDS sida_trainer LABELS unit threads)
sida_test(topk_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/topk_test.c DEPENDS sida_trainer LABELS unit)
sida_test(evaluate_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/evaluate_test.c DEPENDS sida_trainer
  LABELS unit)
sida_test(evaluate_refined_test
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/evaluate_refined_test.c DEPENDS sida_trainer LABELS unit)
sida_test(calibrate_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/calibrate_test.c DEPENDS sida_trainer
  LABELS unit)
sida_test(refine_train_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/refine_train_test.c
  DEPENDS sida_trainer LABELS unit threads)
