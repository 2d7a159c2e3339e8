#define EOPD_STUDENT Bits16
#define EOPD_TEACHER Bits16
#define EOPD_LAUNCHERS launchers_16_16
#include "launchers.cuh"
