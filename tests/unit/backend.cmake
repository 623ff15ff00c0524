sida_test(backend_test SOURCES backend_test.c DEPENDS sida_backend LABELS unit threads)
if(SIDA_HAVE_CUDA)
  sida_test(backend_cuda_words_test SOURCES backend_cuda_words_test.c DEPENDS sida_backend
    LABELS unit)
endif()
