"""What this machine can do."""

from __future__ import annotations

from functools import cache

import torch


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has matrix products for it; PyTorch's own are 6 to 30 times slower than float32's."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    asked = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(
        asked._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else asked._is_mkldnn_fp16_supported()
    )
