"""The ops of the training step, one a file: what each computes, what it moves, and its implementations.

Every op takes `backend="auto" | "triton" | "cpu" | "reference"` (attention also "sdpa" and "flash_attn"), is
differentiable, and sums in float32 inside (float64 for float64 inputs).

A new op is its file here, its test and its benchmark; what needs a list of the ops finds it. Only the names below are
written by hand, since a type checker reads them: tests/kernels/test_ops.py says which one is missing.
"""

import importlib
import pkgutil

from spt_fast.kernels.activation import swiglu as swiglu
from spt_fast.kernels.activation import swiglu_packed as swiglu_packed
from spt_fast.kernels.adamw import adamw_step as adamw_step
from spt_fast.kernels.adamw import adamw_step_all as adamw_step_all
from spt_fast.kernels.allocator import keep_freed_memory as keep_freed_memory
from spt_fast.kernels.attention import flash_attention as flash_attention
from spt_fast.kernels.backend import auto_backends as auto_backends
from spt_fast.kernels.backend import chosen_backends as chosen_backends
from spt_fast.kernels.backend import prefer as prefer
from spt_fast.kernels.cross_entropy import linear_cross_entropy as linear_cross_entropy
from spt_fast.kernels.embedding import embedding as embedding
from spt_fast.kernels.fp8 import fp8_linear as fp8_linear
from spt_fast.kernels.norm import add_rms_norm as add_rms_norm
from spt_fast.kernels.norm import rms_norm as rms_norm
from spt_fast.kernels.rotary import qk_norm_rope as qk_norm_rope
from spt_fast.kernels.rotary import rope as rope

for _file in pkgutil.iter_modules(__path__):
    # Not by __name__: transformers imports `kernels`, in a checkout this folder, and ops defined twice crash.
    importlib.import_module(f"spt_fast.kernels.{_file.name}")
