"""Compiles a kernel for a card that is not here, and reads back what the compiler made of it.

Needs Triton's wheel alone: its ptxas, cuobjdump and nvdisasm. Knows no kernel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["ARCHITECTURES", "Compiled", "compile_kernel"]

# Compute capability -> bytes of shared memory that one block may have.
ARCHITECTURES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}

_MAX_REGISTERS = 255  # of one thread
_REGISTER_FILE = 65536  # of one multiprocessor, and so of one block


@dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel for one architecture."""

    arch: int
    num_warps: int
    num_registers: int  # of one thread
    stack_bytes: int  # of one thread: spilled registers and arrays that are indexed at run time
    shared_bytes: int  # of one block
    ptx: str
    sass: str

    def count(self, opcode: str) -> int:
        """Instructions whose name begins with ``opcode``, such as ``LDGSTS`` or ``HGMMA.64x16``."""
        return len(re.findall(rf"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?{opcode}", self.sass, re.M))

    def faults(self, *, contains: tuple[str, ...] = ()) -> list[str]:
        """What is wrong with it: spills, limits of the card, a wanted instruction that is missing.

        Args:
            contains: opcodes that must occur, for example ``("LDGSTS", "HMMA")`` for loads that
                are pipelined and products on tensor cores.
        """
        found = []
        if self.stack_bytes or self.count("LDL") or self.count("STL"):
            found.append(f"spills to a stack of {self.stack_bytes} bytes")
        if self.shared_bytes > ARCHITECTURES[self.arch]:
            found.append(f"{self.shared_bytes} bytes of shared memory are too many for {self.arch}")
        if self.num_registers > _MAX_REGISTERS:
            found.append(f"{self.num_registers} registers are more than {_MAX_REGISTERS}")
        if self.num_registers * 32 * self.num_warps > _REGISTER_FILE:
            found.append(f"{self.num_registers} registers do not fit {self.num_warps} warps")
        return found + [f"no {opcode}" for opcode in contains if not self.count(opcode)]

    def waits_first(self) -> bool:
        """Whether it waits for the previous kernel before it reads memory or branches.

        A program that returned without waiting would let the next kernel overtake the previous one.
        """
        before, wait, _ = self.ptx.partition("griddepcontrol.wait")
        return bool(wait) and not re.search(r"\b(ld\.global|bra|ret)\b", before)


def compile_kernel(
    kernel: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    arch: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    launch_pdl: bool = False,
) -> Compiled:
    """Compile a kernel as a launch would.

    Must not run where ``TRITON_INTERPRET`` is set: kernels are no kernels there.

    Args:
        kernel: ``module:function``.
        signature: name -> Triton's name of the type of each argument that is no constexpr: ``*bf16``,
            ``fp32``, ``i32``. Pointers are taken to be aligned to 16 bytes, unless the kernel is not
            to notice; an integer that is a multiple of 16, which a launch notices, ends in
            ``:16``.
        constexprs: name -> value of each argument that is one.
        arch: compute capability, one of ``ARCHITECTURES``.
        num_warps: of a block.
        num_stages: of pipelined loops.
        launch_pdl: compile for programmatic dependent launch.

    Raises:
        ValueError: an argument is neither in the signature nor a constexpr.
    """
    module, name = kernel.split(":")
    function = getattr(import_module(module), name)
    missing = set(function.arg_names) ^ {*signature, *constexprs}
    if missing:
        raise ValueError(f"{kernel}: not given, or not known: {', '.join(sorted(missing))}")
    types, attributes = {}, {}
    for index, argument in enumerate(function.arg_names):
        kind = signature.get(argument, "constexpr")
        types[argument] = kind.removesuffix(":16")
        is_free = function.params[index].do_not_specialize_on_alignment
        if (kind.startswith("*") and not is_free) or kind.endswith(":16"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, types, dict(constexprs), attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": launch_pdl}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(built.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    return Compiled(
        arch=arch,
        num_warps=num_warps,
        num_registers=_number(usage, "REG"),
        stack_bytes=_number(usage, "STACK") + _number(usage, "LOCAL"),
        shared_bytes=built.metadata.shared,
        ptx=built.asm["ptx"],
        sass=sass,
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run(
        [tool, option, str(cubin)], check=True, capture_output=True, text=True
    ).stdout


def _number(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    assert found is not None, usage
    return int(found.group(1))
