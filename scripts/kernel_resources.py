#!/usr/bin/env python
"""Compile the kernels for GPUs of three generations, without one, and print what they take.

    python scripts/kernel_resources.py [--json]

Registers of a thread, bytes spilled to memory, bytes of shared memory of a program, and loads of 16 bytes among all loads.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stts_lightning.kernels.cuda import pool, window

TARGETS = (80, 90, 100)

SIZES = {"C": 96, "BLOCK": 128, "ROWS": pool.ROWS}
STRIDES = {"ST": 1, "SH": 2, "SW": 2}
WINDOW = {"WT": 8, "WH": 7, "WW": 7, "C": 32, "CP": 32, "SIDE": window.SIDE, "MASKED": True, "PRECISION": "tf32"}
FLOATS = {"lse", "delta", "partial"}
POINTERS = {"x", "weight", "gamma", "beta", "out", "conv", "grad_out", "grad_conv", "grad_x", "qkv", "bias", "grad_qkv", *FLOATS}

POOL = {"num_warps": pool.WARPS}
KERNELS: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
    "pool, forward": (pool._forward, {**SIZES, **STRIDES, "SAVE": True}, POOL),
    "pool, norm backward": (pool._backward_norm, SIZES, POOL),
    "pool, input backward": (pool._backward_input, {**SIZES, **STRIDES}, POOL),
    "pool, weight backward": (pool._backward_weight, {**SIZES, **STRIDES}, POOL),
    "window, forward": (window._forward, {**WINDOW, "SAVE": True}, window.FORWARD),
    "window, queries backward": (window._backward_queries, WINDOW, window.QUERIES),
    "window, keys backward": (window._backward_keys, WINDOW, window.KEYS),
    "window, bias backward": (window._backward_bias, WINDOW, window.BIAS),
}


def options_for(name: str, options: dict[str, int], target: int) -> dict[str, int]:
    """How a kernel is compiled for a target."""
    return window.KEYS_ON_BLACKWELL if name == "window, keys backward" and target >= 100 else options


def resources(kernel: Any, constants: dict[str, Any], options: dict[str, int], target: int) -> dict[str, Any]:
    """Compile one kernel, in bfloat16, and read what the assembler says of it."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = "*fp32" if name in FLOATS else "*bf16"
        else:
            signature[name] = "*i16" if name == "regions" else "fp32" if name in ("eps", "scale") else "i32"
    # Tensors begin at multiples of 16 bytes, and so do rows of whole heads.
    aligned = [i for i, name in enumerate(kernel.arg_names) if name in POINTERS or name.startswith("stride_")]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    ptx = compiled.asm["ptx"]
    loads = re.findall(r"ld\.global\S*", ptx)
    wide = [load for load in loads if re.search(r"v4\.b32|v2\.b64|v8\.b16", load)]
    # Triton brings an assembler of its own for Blackwell.
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = tools / ("ptxas-blackwell" if target >= 100 and (tools / "ptxas-blackwell").is_file() else "ptxas")
    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run(
            [assembler, "-v", f"--gpu-name={architecture[1]}", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    registers, spilled = re.search(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill", said)
    assert registers and spilled, said
    return {
        "registers": int(registers[1]),
        "spills": sum(map(int, spilled)),
        "shared": compiled.metadata.shared,
        "loads": len(loads),
        "wide_loads": len(wide),
    }


def main() -> None:
    """Print a table, or JSON."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", action="store_true")
    as_json = arguments.parse_args().json
    rows = [
        {"kernel": name, "target": f"sm_{target}", **resources(kernel, constants, options_for(name, options, target), target)}
        for name, (kernel, constants, options) in KERNELS.items()
        for target in TARGETS
    ]
    if as_json:
        print(json.dumps(rows))
        return
    print("| kernel | target | registers | bytes spilled | bytes shared | 16-byte loads of all |\n|---|---|---|---|---|---|")
    for row in rows:
        kernel = f"{row['kernel']} | {row['target']} | {row['registers']} | {row['spills']}"
        print(f"| {kernel} | {row['shared']} | {row['wide_loads']} of {row['loads']} |")


if __name__ == "__main__":
    main()
