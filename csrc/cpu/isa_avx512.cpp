// Kernels for the instruction set "avx512"; setup.py gives the compiler its flags.
#define PEFTDYNO_ISA avx512
#include "table.h"
