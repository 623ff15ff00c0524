sida_test(data_test SOURCES data_test.c
  DEPENDS sida_data sida_test_support ZLIB::ZLIB LABELS unit)
