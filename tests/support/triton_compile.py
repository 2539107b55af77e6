"""Kernels compiled for GPUs that this machine does not have: Triton and its assembler need none for that."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attar.runtime.triton.activations import EXACT, ROTATIONS, Factors
from attar.runtime.triton.codes import BLOCK, planes
from attar.runtime.triton.dense import dense_matmul, unpack_rows
from attar.runtime.triton.matmul import float8_matmul, integer_matmul, weight_only_matmul
from attar.runtime.triton.products import plane_depth
from attar.runtime.triton.quantize import quantize_rows
from attar.runtime.triton.rotate import quantize_rotated_rows

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
        if name not in constants and (pointers.get(name, "").startswith("*") or name in DIVISIBLE):
            attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**options, **EXACT})


def compiled_quantize(capability, bits=4, dtype="bf16", **fixed):
    pointers = {
        "x_ptr": dtype,
        "shift_ptr": "fp32",
        "channel_ptr": "fp32",
        "clip_ptr": "fp32",
        "codes_ptr": "i8",
        "step_ptr": "fp32",
    }
    constants = {
        "MOST": 127.0,
        "PLANES": planes(bits),
        "FIRST": 1024,
        "SECOND": 512,
        "FULL": 2,
        "FP8": False,
        "SIGNED": False,
        **fixed,
    }
    pointers = {name: f"*{kind}" for name, kind in pointers.items()}
    return compiled(quantize_rows, pointers, constants, capability, num_warps=4)


def compiled_rotation(capability, left, right, order=0, bits=8, dtype="bf16", config=ROTATIONS[0], **fixed):
    """order: of a Hadamard base, 0 for a Kronecker product."""
    factors = Factors(order, left, right)
    pointers = {
        "x_ptr": dtype,
        "shift_ptr": "fp32",
        "channel_ptr": "fp32",
        "clip_ptr": "fp32",
        "codes_ptr": "i8",
        "step_ptr": "fp32",
    }
    unused = {"right_ptr": None} if order else {"signs_ptr": None, "norm": 1.0}
    pointers |= {"signs_ptr": "i8", "left_ptr": "i8"} if order else {"left_ptr": "fp32", "right_ptr": "fp32"}
    pointers = {name: f"*{kind}" for name, kind in pointers.items()} | ({"norm": "fp32"} if order else {})
    constants = {
        "ORDER": order, "MOST": 127.0, "PLANES": planes(bits), "LEFT": left, "RIGHT": right, "L": factors.padded[0],
        "R": factors.padded[1], "HALF": dtype != "fp32", "BLOCK": BLOCK, "FP8": False,
        "SIGNED": False, **unused, **fixed,
    }  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return compiled(quantize_rotated_rows, pointers, constants, capability, **options)


def compiled_dense(capability, config, dtype="bf16", **fixed):
    """The product of many rows."""
    pointers = {"step_ptr": "fp32", "scale_ptr": "fp32", "bias_ptr": "bf16", "y_ptr": dtype}
    pointers = {name: f"*{kind}" for name, kind in pointers.items()}
    pointers |= {
        "x": f"tensordesc<i8[{config.rows}, {config.depth}]>",
        "w": f"tensordesc<i8[{config.outputs}, {config.depth}]>",
    }
    constants = {
        "BLOCK_M": config.rows, "BLOCK_N": config.outputs, "BLOCK_K": config.depth, "GROUP": config.group,
        "FLATTEN": bool(config.flatten), "GELU": None, **fixed,
    }  # fmt: skip
    return compiled(
        dense_matmul, pointers, constants, capability, num_warps=config.warps, num_stages=config.stages
    )


def compiled_unpack(capability, bits, dtype="i8", **fixed):
    """Codes alone: without scales."""
    pointers = {"codes_ptr": "*u8", "w_ptr": f"*{dtype}"}
    constants = {"scale_ptr": None, "groups": 1, "BITS": bits, "BLOCK": 2048, "FP8": False, **fixed}
    return compiled(unpack_rows, pointers, constants, capability, num_warps=4)


def compiled_product(capability, config, bits, dtype="bf16", weight_only=False, float8=False, **fixed):
    """fixed: arguments that Triton makes constants, as it does with None and with 1."""
    pointers = {"codes_ptr": "u8", "scale_ptr": "fp32", "bias_ptr": dtype, "y_ptr": dtype}
    pointers |= {"x_ptr": dtype} if weight_only else {"x_ptr": "i8", "step_ptr": "fp32"}
    constants = {
        "BITS": bits, "PLANES": planes(bits), "WHOLE": True, "GROUP": 8,
        "BLOCK_M": config.rows, "BLOCK_N": config.outputs, "BLOCK_K": plane_depth(config, bits, not weight_only),
        **({"FP8": float8} if weight_only else {"GELU": None}), **fixed,
    }  # fmt: skip
    return compiled(
        weight_only_matmul if weight_only else float8_matmul if float8 else integer_matmul,
        {name: f"*{kind}" for name, kind in pointers.items()},
        constants,
        capability,
        num_warps=config.warps,
        num_stages=config.stages,
    )
