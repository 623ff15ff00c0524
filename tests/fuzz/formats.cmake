sida_test(formats_fuzz SOURCES formats_fuzz.c
  DEPENDS sida_data sida_test_support ZLIB::ZLIB LABELS fuzz)
