#define EOPD_STUDENT Bits32
#define EOPD_TEACHER Bits16
#define EOPD_LAUNCHERS launchers_32_16
#include "launchers.cuh"
