// Kernels for the instruction set "amx"; setup.py gives the compiler its flags.
#define PEFTDYNO_ISA amx
#define PEFTDYNO_TILES
#include "table.h"
