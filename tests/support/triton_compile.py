"""Kernels compiled for GPUs that this machine does not have: Triton and its assembler need none for that."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attar.runtime.triton.codes import planes
from attar.runtime.triton.kernels import EXACT
from attar.runtime.triton.matmul import integer_matmul, weight_only_matmul
from attar.runtime.triton.quantize import quantize_rows

DIVISIBLE = (
    "n",
    "width",
    "columns",
    "plane_stride",
    "row_bytes",
    "x_stride",
    "codes_stride",
)  # in real models


def compiled(kernel, pointers, constants, capability, **options):
    """The kernel for a compute capability such as 90. pointers: name -> type; all other arguments are int32."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if name in pointers or name in DIVISIBLE:
            attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**options, **EXACT})


def compiled_quantize(capability, bits=4, dtype="bf16"):
    pointers = {
        "x_ptr": dtype,
        "channel_ptr": "fp32",
        "clip_ptr": "fp32",
        "codes_ptr": "i8",
        "step_ptr": "fp32",
    }
    constants = {"MOST": 127.0, "PLANES": planes(bits), "BLOCK": 1024}
    pointers = {name: f"*{kind}" for name, kind in pointers.items()}
    return compiled(quantize_rows, pointers, constants, capability, num_warps=4)


def compiled_product(capability, config, bits, dtype="bf16", weight_only=False):
    pointers = {"codes_ptr": "u8", "scale_ptr": "fp32", "bias_ptr": dtype, "y_ptr": dtype}
    pointers |= {"x_ptr": dtype} if weight_only else {"x_ptr": "i8", "step_ptr": "fp32"}
    constants = {
        "BITS": bits, "PLANES": planes(bits), "WHOLE": True, "GROUP": 8,
        "BLOCK_M": config.rows, "BLOCK_N": config.outputs, "BLOCK_K": config.depth,
    }  # fmt: skip
    return compiled(
        weight_only_matmul if weight_only else integer_matmul,
        {name: f"*{kind}" for name, kind in pointers.items()},
        constants,
        capability,
        num_warps=config.warps,
        num_stages=config.stages,
    )
