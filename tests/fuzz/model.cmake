sida_test(model_fuzz SOURCES ${CMAKE_CURRENT_LIST_DIR}/model_fuzz.c DEPENDS sida_model LABELS fuzz)
