// Kernels for the instruction set "avx512_bf16"; setup.py gives the compiler its flags.
#define PEFTDYNO_ISA avx512_bf16
#include "table.h"
