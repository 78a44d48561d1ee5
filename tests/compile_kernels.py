"""Compile, without a card, what the kernels' wrappers would launch: ``python -m tests.compile_kernels SM...``.

The interpreter forgives much that the compiler does not. So each wrapper is called with tensors on the CPU, its
launches are caught on their way, and what they would have compiled is compiled for the given capabilities. Prints a
JSON line a kernel: its name, capability, registers a thread, spilled bytes, bytes of shared memory, and how many sums
with a product the compiler made one multiply-add of, in PTX and machine code.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.diffusion import machine_triton
from model.diffusion.plan import Columns
from model.network.kernels.norm import norm
from model.network.kernels.residual import residual

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
SCALARS = {int: "i32", float: "fp32"}
# C, H, W, groups: one launch and two, of groups that are powers of two and of others; and the largest tiles.
SHAPES = [(128, 32, 32, 32), (128, 64, 64, 32), (672, 8, 8, 32), (96, 128, 128, 32), (448, 32, 32, 32)]


def caught(call) -> list[tuple]:
    """(kernel, arguments by name, options) of each launch that ``call`` makes."""
    launches = []

    def run(kernel, *args, grid, warmup, **named):
        names = kernel.arg_names
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in named.items() if k in names}
        launches.append((kernel, given, {k: v for k, v in named.items() if k not in names}))

    launch, triton.runtime.jit.JITFunction.run = triton.runtime.jit.JITFunction.run, run
    try:
        call()
    finally:
        triton.runtime.jit.JITFunction.run = launch
    return launches


def compiled(kernel, given: dict, options: dict, capability: int):
    """As the launch would have it: aligned pointers are known to be, but for those that are not specialized."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = SCALARS[type(value)]
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def calls() -> list:
    """Every wrapper in every form."""
    every = []
    for dtype in (torch.bfloat16, torch.float32):
        for C, H, W, groups in SHAPES:
            x = torch.empty(2, C, H, W, dtype=dtype).to(memory_format=torch.channels_last)
            w, given = torch.empty(C), torch.empty(2, 4 * C, dtype=dtype)
            for more in (
                {},
                {"add": given[:, C : 2 * C]},
                {"scale_shift": given[:, : 2 * C], "add": torch.empty(1, C)},
            ):
                every.append(lambda x=x, w=w, g=groups, more=more: norm(x, w, w, g, 1e-5, silu=bool(more), **more))
        for scale in (1.0, 2**0.5):
            every.append(lambda x=x, w=w, scale=scale: residual(x, x, w, scale))
    for R in (1, 5):
        state, u, coef = torch.empty(2, R, 3, 8, 8), torch.empty(2, 3, 8, 8), torch.zeros(2, Columns(R).width)
        twice = torch.empty(2, 6, 8, 8)
        every += [
            lambda s=state, u=u, c=coef: machine_triton.update(s, u, u, None, c),
            lambda s=state, u=u, c=coef: machine_triton.update(s, u, u, u, c),
            lambda s=state, u=u, c=coef: machine_triton.update(s, u, u, u, c, x_0=u),
            lambda s=state, u=u, c=coef, o=twice: machine_triton.update(s, u, o, u, c),
            lambda s=state, c=coef: machine_triton.guard(s, s, c),
        ]
    every.append(lambda: machine_triton.predict(u, u, coef))
    return every


def report(kernel, given: dict, binary, capability: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([TOOLS / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    numbers = dict(part.split(":") for line in usage.splitlines() if "REG:" in line for part in line.split())
    return {
        "kernel": kernel.fn.__name__,
        "capability": capability,
        "registers": int(numbers["REG"]),
        "spilled": int(numbers["LOCAL"]) + int(numbers["STACK"]),
        "shared": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
        # libdevice's exp flushes subnormals and nothing else does: that tells its multiply-adds from contracted sums.
        "contracted": len(re.findall(r"fma\.rn\.f32", binary.asm["ptx"])) + len(re.findall(r"FFMA(?!\.FTZ)", code)),
        "sizes": {k: v for k, v in given.items() if isinstance(v, (int, float))},
    }


def main(capabilities: list[int]) -> None:
    seen = set()
    for call in calls():
        for kernel, given, options in caught(call):
            for capability in capabilities:
                binary = compiled(kernel, given, options, capability)
                if binary.hash not in seen:
                    seen.add(binary.hash)
                    print(json.dumps(report(kernel, given, binary, capability)), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
