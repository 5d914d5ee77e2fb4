"""Runs Triton kernels: on the GPU where there is one, else in Triton's interpreter, corrected.

The root conftest switches the interpreter on before anything can import Triton. Compilation for
cards that are not here happens in a process of its own, where it is off.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from vllm.kernels.triton.offline import Compiled, compile_kernel

_FLOATS = {
    tl.bfloat16: (np.int16, torch.bfloat16),
    tl.float8e4nv: (np.int8, torch.float8_e4m3fn),
    tl.float8e5: (np.int8, torch.float8_e5m2),
}


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this session."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["in order", "reversed"])
def grid_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Order in which the interpreter runs programs; a GPU keeps to none."""
    if request.param == "reversed":
        if torch.cuda.is_available():
            pytest.skip("the order of programs is the GPU's affair")
        builder = interpreter.interpreter_builder
        forward = builder.set_grid_idx

        def backward(*index: int) -> None:
            forward(*(n - 1 - i for n, i in zip(builder.grid_dim, index, strict=True)))

        monkeypatch.setattr(builder, "set_grid_idx", backward)
    return str(request.param)


@pytest.fixture(scope="session")
def compile_offline() -> Iterator[Callable[..., Compiled]]:
    """``compile_kernel`` in a process without interpreter, which ends with the session."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            pool.submit(int).result()  # starts the process, which keeps this environment
        yield lambda *args, **kwargs: pool.submit(compile_kernel, *args, **kwargs).result()


@pytest.fixture(autouse=True, scope="session")
def _corrected_interpreter() -> Iterator[None]:
    """Triton 3.6's interpreter without its known errors in small floats and with NumPy >= 2.4."""
    with pytest.MonkeyPatch.context() as patch:
        builder = interpreter.InterpreterBuilder
        patch.setattr(interpreter, "_convert_float", _convert_float)
        patch.setattr(interpreter, "_patch_lang_tensor", _patch_lang_tensor)
        patch.setattr(builder, "create_dot", _create_dot)
        patch.setattr(builder, "binary_op", _binary_op)
        patch.setattr(builder, "create_si_to_fp", _create_si_to_fp)
        yield


_original_patch_lang_tensor = interpreter._patch_lang_tensor
_original_convert_float = interpreter._convert_float
_original_binary_op = interpreter.InterpreterBuilder.binary_op


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """Loop bounds that are tensors: NumPy 2.4 makes no int of an array of one."""
    _original_patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _convert_float(value: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Casts that round to nearest even, as cards do; the interpreter's own cut bits off.

    A cast to a float of 8 bits saturates, as the instruction that Triton emits does.
    """
    if {source, target} <= {*_FLOATS, tl.float32, tl.float16}:
        numbers = _to_torch(value, source)
        if target in (tl.float8e4nv, tl.float8e5):
            limit = torch.finfo(_FLOATS[target][1]).max
            numbers = numbers.clamp(-limit, limit)
        return _from_torch(numbers, target)
    return _original_convert_float(value, source, target, rounding)


def _to_torch(value: Any, dtype: Any) -> torch.Tensor:
    """float32 values of an array in the interpreter's form."""
    if dtype in _FLOATS:
        bits, as_float = _FLOATS[dtype]
        return torch.from_numpy(np.ascontiguousarray(value).view(bits)).view(as_float).float()
    return torch.from_numpy(np.ascontiguousarray(value)).float()


def _from_torch(numbers: torch.Tensor, dtype: Any) -> Any:
    if dtype in _FLOATS:
        bits, as_float = _FLOATS[dtype]
        as_bits = torch.int16 if bits is np.int16 else torch.int8
        array = numbers.to(as_float).view(as_bits).numpy()
        return array.view(np.uint16 if bits is np.int16 else np.uint8)
    return numbers.numpy().astype(np.float16 if dtype == tl.float16 else np.float32)


def _create_si_to_fp(self: Any, value: Any, target: Any) -> Any:
    """Integers as floats; the interpreter's own leave them as the bits of small ones."""
    numbers = torch.from_numpy(value.data.astype(np.float32))
    return interpreter.TensorHandle(_from_torch(numbers, target.scalar), target.scalar)


def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, _: Any) -> Any:
    """Products in the accumulator's type; the interpreter's own take bfloat16 for integers.

    Floats are summed in float64, in which the order hardly counts: BLAS has one of its own for each
    place that a row may have among the others, which a card's product does not.
    """
    if a.dtype.scalar.is_int():
        product = np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data
    else:
        x, y = (_to_torch(each.data, each.dtype.scalar).numpy().astype(float) for each in (a, b))
        product = (np.matmul(x, y) + d.data).astype(d.data.dtype)
    return interpreter.TensorHandle(product, d.dtype.scalar)


def _binary_op(self: Any, lhs: Any, rhs: Any, operation: Any) -> Any:
    """Refuses what the interpreter would compute on the bits of small floats."""
    if lhs.dtype.scalar in _FLOATS:
        raise TypeError(f"arithmetic on {lhs.dtype.scalar}: make it float32 first")
    return _original_binary_op(self, lhs, rhs, operation)
