#!/usr/bin/env python3
"""Writes wgmma_shapes.cuh: a product of each width N, since an asm statement cannot be templated on
its operand count. Run it in this folder: ./generate_wgmma.py > wgmma_shapes.cuh"""
import textwrap

WIDTHS = range(8, 257, 8)
TYPES = {"__nv_bfloat16": "bf16", "__half": "f16"}
A_FORMS = {  # operand text, C++ parameter, constraints
    "ss": (1, "uint64_t a", '"l"(a)'),
    "rs": (4, "const uint32_t* a", '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])'),
}


def wrapped(text, indent):
    return textwrap.fill(text, 99, initial_indent=" " * indent, subsequent_indent=" " * indent)


def product(width, name, form):
    count = width // 2
    a_count, a_parameter, a_constraints = A_FORMS[form]
    accumulators = ", ".join(f"%{i}" for i in range(count))
    a_registers = ", ".join(f"%{count + i}" for i in range(a_count))
    a_text = a_registers if a_count == 1 else "{" + a_registers + "}"
    b, accumulate, transposed = count + a_count, count + a_count + 1, count + a_count + 2
    signs = "1, 1, 0" if a_count == 1 else "1, 1"
    lines = textwrap.wrap(f"{{{accumulators}}},", 88)
    asm_lines = [
        '"{\\n.reg .pred p;\\nsetp.ne.b32 p, %' + str(accumulate) + ', 0;\\n"',
        f'"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{name}.{name} "',
        *(f'"{line} "' for line in lines),
        f'"{a_text}, %{b}, p, {signs}, %{transposed};\\n}}"',
    ]
    outputs = wrapped(", ".join(f'"+f"(d[{i}])' for i in range(count)), 10).lstrip()
    return "\n".join([
        "  template <int kTransposeB>",
        f"  static __device__ __forceinline__ void {form}(float (&d)[{count}], {a_parameter}, uint64_t b,",
        "                                            int accumulate) {",
        "    asm volatile(",
        *(f"        {line}" for line in asm_lines),
        f"        : {outputs}",
        f'        : {a_constraints}, "l"(b), "r"(accumulate), "n"(kTransposeB));',
        "  }",
    ])


print("""// Written by generate_wgmma.py; do not edit.
//
// Wgmma<N, T>::ss takes a from shared memory, ::rs from four registers; both take b from shared
// memory and overwrite d where `accumulate` is 0.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace wh::cuda::ptx {

template <int N, typename T>
struct Wgmma;
""")
for width in WIDTHS:
    for cpp_type, name in TYPES.items():
        print(f"template <>\nstruct Wgmma<{width}, {cpp_type}> {{")
        print(product(width, name, "ss"))
        print(product(width, name, "rs"))
        print("};\n")
print("}  // namespace wh::cuda::ptx")
