add_test(NAME includes COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/check_includes.sh ${CMAKE_SOURCE_DIR})
set_tests_properties(includes PROPERTIES LABELS unit)
