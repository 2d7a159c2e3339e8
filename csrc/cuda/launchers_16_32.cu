#define EOPD_STUDENT Bits16
#define EOPD_TEACHER Bits32
#define EOPD_LAUNCHERS launchers_16_32
#include "launchers.cuh"
