"""Compile the kernels for a GPU that need not be there: python -m tests.compile_kernels. Prints what became of each.

Triton's interpreter, in which the kernels are tested, takes more than its compiler does.
"""

import json
from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models import spike_ops_triton as kernels
from models.spike_ops import ACTIVATIONS, RESETS

HOPPER = GPUTarget("cuda", 90, 32)
BLOCKS = {"BLOCK_N": 8, "BLOCK_H": 128}
DTYPES = {"bf16": "fp32", "fp64": "fp64"}
"""Of tensors, and of the arithmetic on them."""


def main() -> None:
    """Compile every kernel in every form that differs."""
    fused = {}
    for dtype, compute in DTYPES.items():
        for (reset, name), in_cells in product(enumerate(RESETS), (False, True)):
            if in_cells and not reset:
                continue
            form = {"T": 3, "RESET": reset, "LEAK": 0.25, "HAS_CARRY": in_cells, "LEAVES": in_cells, **BLOCKS}
            form |= {"ACTIVATION": None, "GATED": False}
            name = f"{name} in cells" if in_cells else name
            fused[f"encode {dtype} {name}"] = compile_for_gpu(kernels._encode, form, "x_ptr", dtype, compute)
            fused[f"backward {dtype} {name}"] = compile_for_gpu(
                kernels._membrane_backward, form, "grad_ptr hidden_ptr grad_x_ptr", dtype, compute
            )
        fused[f"decode {dtype}"] = compile_for_gpu(kernels._decode, BLOCKS, "worth_ptr out_ptr", dtype, compute)
    for activation, name in enumerate(ACTIVATIONS):
        form |= {"ACTIVATION": activation, "GATED": activation > 0}
        fused[f"encode {name}"] = compile_for_gpu(kernels._encode, form, "x_ptr", "bf16", "fp32")
        fused[f"backward {name}"] = compile_for_gpu(
            kernels._membrane_backward, form, "grad_ptr hidden_ptr grad_x_ptr", "bf16", "fp32"
        )
    print(json.dumps(fused))


def compile_for_gpu(kernel: triton.JITFunction, form: dict[str, object], wide: str, dtype: str, compute: str) -> int:
    """How many fused multiply-adds, which would round otherwise than the reference, the machine code has."""
    signature = {}
    for name in kernel.arg_names:
        if name in form:
            signature[name] = "constexpr"
        elif not name.endswith("_ptr"):
            signature[name] = "i32"
        else:
            signature[name] = "*u8" if name == "code_ptr" else f"*{dtype if name in wide.split() else compute}"
    constants = {(kernel.arg_names.index(name),): value for name, value in form.items()}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=HOPPER, options={"enable_fp_fusion": False})
    return made.asm["ptx"].count("fma.rn.f")


if __name__ == "__main__":
    main()
