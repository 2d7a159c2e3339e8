#define EOPD_STUDENT AnyBits
#define EOPD_TEACHER AnyBits
#define EOPD_LAUNCHERS launchers_any
#include "launchers.cuh"
