"""Compiles kernels for GPUs where there is none: the interpreter runs what the compiler refuses."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, clean_environment

PROGRAM = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module, name, jobs = json.load(sys.stdin)
kernel = getattr(importlib.import_module(module), name)
while not isinstance(kernel, triton.runtime.jit.JITFunction):
    kernel = kernel.fn
place = {name: (n,) for n, name in enumerate(kernel.arg_names)}
assembly = []
for job in jobs:
    types = {name: job["types"].get(name, "constexpr") for name in place}
    aligned = {place[name]: [["tt.divisibility", 16]] for name in types if types[name][0] in "*i"}
    source = ASTSource(kernel, types, {place[k]: v for k, v in job["constants"].items()}, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", job["capability"], 32),
                          options=job["options"])
    assembly.append((done.asm["ptx"], done.metadata.shared))
print(json.dumps(assembly))
"""


def compile_for_gpu(module: str, kernel: str, jobs: list[dict], cache: Path) -> list:
    """(PTX, bytes of shared memory) for each of `jobs` of one kernel: {"capability": 90, "types":
    {argument: "*bf16", "i32", ...}, "constants": {argument: value}, "options": {"num_warps": 8}}.
    Pointers and ints are promised to be multiples of 16, as they are at the trainer's shapes."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps([module, kernel, jobs]), text=True,
        capture_output=True, cwd=ROOT, timeout=100,
        env=clean_environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache)))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
