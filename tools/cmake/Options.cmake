# Compile and link options that every target of the tree takes, on one interface target.
add_library(sida_options INTERFACE)
target_compile_definitions(sida_options INTERFACE _GNU_SOURCE SIDA_VERSION="${PROJECT_VERSION}")
target_include_directories(sida_options INTERFACE ${CMAKE_SOURCE_DIR})
set(host_only $<COMPILE_LANGUAGE:C,CXX>)
set(nvcc_only $<COMPILE_LANGUAGE:CUDA>)
target_compile_options(sida_options INTERFACE
  $<${host_only}:-Wall> $<${host_only}:-Wextra> $<${host_only}:-Wshadow>
  $<${host_only}:-Wpointer-arith> $<${host_only}:-Wvla>
  $<$<COMPILE_LANGUAGE:C>:-Wstrict-prototypes> $<$<COMPILE_LANGUAGE:C>:-Wmissing-prototypes>
  # Exact routing promises bytes: no reassociation, and the same contraction everywhere.
  $<${host_only}:-fno-math-errno> $<${host_only}:-ffp-contract=fast>
  $<${nvcc_only}:-Xcompiler=-Wall,-Wextra>)
if(SIDA_WERROR)
  target_compile_options(sida_options INTERFACE $<${host_only}:-Werror>
    $<${nvcc_only}:-Xcompiler=-Werror> $<${nvcc_only}:-Werror=all-warnings>)
endif()
if(SIDA_SANITIZE)
  target_compile_options(sida_options INTERFACE
    $<${host_only}:-fsanitize=${SIDA_SANITIZE}> $<${host_only}:-fno-omit-frame-pointer>
    $<${host_only}:-fno-sanitize-recover=all>)
  target_link_options(sida_options INTERFACE -fsanitize=${SIDA_SANITIZE})
endif()

# sida_folder(NAME SOURCES... [DEPENDS targets...]): the one target of a folder.
function(sida_folder name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  target_link_libraries(${name} PUBLIC sida_options ${ARG_DEPENDS})
endfunction()
