// Kernels for the instruction set "amx"; setup.py gives the compiler its flags.
#define PEFTDYNO_ISA amx
#define PEFTDYNO_TILES  // compilers name their own macro for AMX differently
#include "table.h"
