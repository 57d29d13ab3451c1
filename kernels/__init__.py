"""The ops of the training step, one per file: the mathematics, the memory traffic, and the implementations.

Every op takes `backend="auto" | "triton" | "cpu" | "reference"` (attention also "sdpa" and "flash_attn"), is
differentiable, and sums in float32 inside (float64 for float64 inputs).
A new op needs its file here, its test and its benchmark; code that lists the ops finds it. Only the names below are
written by hand, since a type checker reads them: tests/kernels/test_ops.py reports a missing one.
"""

import importlib
import pkgutil

from spt_fast.kernels import backend
from spt_fast.kernels.activation import swiglu, swiglu_linear, swiglu_packed
from spt_fast.kernels.adamw import adamw_step, adamw_step_all
from spt_fast.kernels.allocator import keep_freed_memory, return_freed_memory
from spt_fast.kernels.arguments import explained
from spt_fast.kernels.attention import flash_attention, qkv_attention
from spt_fast.kernels.backend import auto_backends, chosen_backends, prefer
from spt_fast.kernels.cross_entropy import linear_cross_entropy
from spt_fast.kernels.embedding import embedding
from spt_fast.kernels.feed_forward import swiglu_mlp
from spt_fast.kernels.fp8 import fp8_linear
from spt_fast.kernels.gradients import accumulate_in_place
from spt_fast.kernels.linear import linear
from spt_fast.kernels.norm import add_rms_norm, rms_norm
from spt_fast.kernels.rotary import qk_norm_rope, rope
from spt_fast.kernels.self_attention import self_attention

__all__ = [
    "accumulate_in_place",
    "adamw_step",
    "adamw_step_all",
    "add_rms_norm",
    "auto_backends",
    "chosen_backends",
    "embedding",
    "flash_attention",
    "fp8_linear",
    "keep_freed_memory",
    "linear",
    "linear_cross_entropy",
    "prefer",
    "qk_norm_rope",
    "qkv_attention",
    "return_freed_memory",
    "rms_norm",
    "rope",
    "self_attention",
    "swiglu",
    "swiglu_linear",
    "swiglu_mlp",
    "swiglu_packed",
]

for _file in pkgutil.iter_modules(__path__):
    # Not by __name__: transformers imports `kernels`, which in a checkout is this folder, and defining ops twice fails.
    importlib.import_module(f"spt_fast.kernels.{_file.name}")

for _op in (*backend.OPS, "adamw_step_all", "accumulate_in_place"):
    globals()[_op] = explained(globals()[_op])
