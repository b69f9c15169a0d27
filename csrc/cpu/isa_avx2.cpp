// Kernels for the instruction set "avx2"; setup.py gives the compiler its flags.
#define PEFTDYNO_ISA avx2
#include "table.h"
