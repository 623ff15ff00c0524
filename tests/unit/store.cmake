sida_test(store_policy_test SOURCES store_policy_test.c DEPENDS sida_store LABELS unit)
sida_test(store_test SOURCES store_test.c DEPENDS sida_store LABELS unit threads)
sida_test(store_revise_test SOURCES store_revise_test.c DEPENDS sida_store LABELS unit threads)
sida_test(store_plan_test SOURCES store_plan_test.c DEPENDS sida_store LABELS unit)
