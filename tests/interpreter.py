"""Triton's interpreter with the arithmetic of a GPU where it differs: import before any kernel runs in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_float, _patch_lang = interpreter._convert_float, interpreter._patch_lang


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


def _sum(self: Any, values: Any) -> Any:
    """In pairs, as a tree of threads does; along any axis but the last NumPy adds one after the other."""
    data = values.handle.data
    columns = data.ravel() if self.axis is None else np.ascontiguousarray(np.moveaxis(data, self.axis, -1))
    assert not self.keep_dims
    return self.to_tensor(columns.sum(-1), values.dtype)


def _patch_once(kernel: Any) -> Any:
    """All of the language, for a kernel and what it calls. The interpreter does it for every call of a function, wraps
    what is wrapped already, and spends most of its time so."""
    return _patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)


interpreter.ReduceOps.sum = _sum
interpreter._patch_lang = _patch_once
interpreter.InterpretedFunction.__call__ = _call
interpreter.InterpreterBuilder.create_fma = _fma
interpreter._convert_float = _to_nearest
np.seterr(all="ignore")  # infinities are part of the game
