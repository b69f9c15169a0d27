// Kernels for the instruction set "portable"; setup.py gives the compiler its flags.
#define PEFTDYNO_ISA portable
#include "table.h"
