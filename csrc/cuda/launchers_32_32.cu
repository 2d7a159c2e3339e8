#define EOPD_STUDENT Bits32
#define EOPD_TEACHER Bits32
#define EOPD_LAUNCHERS launchers_32_32
#include "launchers.cuh"
