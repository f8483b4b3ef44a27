"""Triton's interpreter with the arithmetic of a GPU where it differs: import before any kernel runs in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """One rounding; the interpreter rounds the product first, which is 5e-4 off for a logit of 1e4."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _to_nearest(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """float32 to bfloat16 rounds to nearest even; the interpreter truncates."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert_float(values, source, target, rounding)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


interpreter.InterpreterBuilder.create_fma = _fma
interpreter._convert_float = _to_nearest
np.seterr(all="ignore")  # infinities are part of the game
