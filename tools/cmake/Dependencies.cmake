# Every third-party library, found once and given one name. All are Debian 12 and Ubuntu 24.04
# packages, CUDA aside.
find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)
find_package(ZLIB REQUIRED)
pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(SENTENCEPIECE REQUIRED IMPORTED_TARGET sentencepiece)
pkg_check_modules(OPENBLAS REQUIRED IMPORTED_TARGET openblas)
find_package(HDF5 1.10 REQUIRED COMPONENTS C)

add_library(sida_hdf5 INTERFACE)
target_include_directories(sida_hdf5 SYSTEM INTERFACE ${HDF5_C_INCLUDE_DIRS})
target_link_libraries(sida_hdf5 INTERFACE ${HDF5_C_LIBRARIES})

add_library(sida_openmp INTERFACE)
if(SIDA_OPENMP)
  find_package(OpenMP REQUIRED COMPONENTS C)
  target_link_libraries(sida_openmp INTERFACE OpenMP::OpenMP_C)
else()
  target_compile_options(sida_openmp INTERFACE -Wno-unknown-pragmas)
endif()

if(SIDA_TESTS)
  pkg_check_modules(CMOCKA REQUIRED IMPORTED_TARGET cmocka)
endif()

# The CUDA back-end fills runtime/backend/backend.h; until it lands, ON is refused rather than
# silently ignored.
set(SIDA_HAVE_CUDA OFF)
if(SIDA_CUDA STREQUAL "ON")
  message(FATAL_ERROR "SIDA_CUDA=ON: this version has no CUDA back-end yet; use AUTO or OFF")
elseif(NOT SIDA_CUDA MATCHES "^(AUTO|OFF)$")
  message(FATAL_ERROR "SIDA_CUDA=${SIDA_CUDA}: expected AUTO, ON or OFF")
endif()
