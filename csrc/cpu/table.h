// Defines the table of the instruction set that PEFTDYNO_ISA names; included once by each of its units.
#pragma once

#include "adamw_kernel.h"
#include "attention_backward_kernel.h"
#include "attention_kernel.h"
#include "attention_single_kernel.h"
#include "bank_affine_kernel.h"
#include "glu_kernel.h"
#include "label_loss_kernel.h"
#include "lora_linear_kernel.h"
#include "nf4_kernel.h"
#include "product_kernel.h"
#include "rms_norm_kernel.h"
#include "rotary_kernel.h"

#define PEFTDYNO_TEXT_(x) #x
#define PEFTDYNO_TEXT(x) PEFTDYNO_TEXT_(x)

namespace peftdyno {
namespace PEFTDYNO_ISA {

const Kernels table = {
    PEFTDYNO_TEXT(PEFTDYNO_ISA),
    norm_forward,
    norm_backward,
    glu_forward,
    glu_backward,
    rotary,
    bank_affine,
    column_sums,
    scale_rows,
    adamw,
    label_loss,
    nf4_dequantise,
    operand_bytes,
#if defined(PEFTDYNO_PRODUCTS)
    product,
#else
    nullptr,
#endif
#if defined(PEFTDYNO_PAIRS)
    pack_product,
#else
    nullptr,
#endif
    lora_pack,
    lora_forward,
    lora_output_gradients,
    lora_strip,
    attention_transpose,
    attention_forward,
    attention_single,
    attention_backward,
    attention_store_keys,
};

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
