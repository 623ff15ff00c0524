add_library(sida_test_support STATIC ${CMAKE_CURRENT_LIST_DIR}/formats_support.c)
target_link_libraries(sida_test_support PUBLIC sida_formats PkgConfig::CMOCKA)

foreach(name safetensors tokenizer h5 trace)
  sida_test(formats_${name}_test SOURCES formats_${name}_test.c
    DEPENDS sida_test_support LABELS unit)
endforeach()
sida_test(checkpoint_memory_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/checkpoint_memory_test.c
  DEPENDS sida_formats LABELS unit)
