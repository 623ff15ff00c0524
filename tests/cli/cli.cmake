# sida_cli_test(NAME [ARGUMENT...]): NAME.sh with the program and these as its arguments.
function(sida_cli_test name)
  add_test(NAME cli_${name} COMMAND sh ${CMAKE_CURRENT_LIST_DIR}/${name}.sh $<TARGET_FILE:sida_cli>
    ${ARGN}
    WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(cli_${name} PROPERTIES LABELS cli TIMEOUT 600 SKIP_RETURN_CODE 77)
endfunction()

sida_cli_test(bad_input)
sida_cli_test(bench)
sida_cli_test(bench_report)
sida_cli_test(bench_train_report)
sida_cli_test(device)
sida_cli_test(eval $<TARGET_FILE:h5edit>)
sida_cli_test(score)
sida_cli_test(predictors)
sida_cli_test(sources)
sida_cli_test(train_options)
add_executable(h5edit ${CMAKE_CURRENT_LIST_DIR}/h5edit.c)
target_link_libraries(h5edit PRIVATE sida_hdf5)
sida_cli_test(foreign $<TARGET_FILE:h5edit>)
