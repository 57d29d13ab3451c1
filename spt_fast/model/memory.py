"""The memory of a training step, part by part, on one of the processes that train together.

Legend: L layers, H query heads, K key/value heads, Q head dimension, D width, F feed-forward width, V vocabulary, T
tokens of a sequence, N tokens of a micro-batch, P parameters, W processes, a bytes of a number in the compute dtype.

Permanent: aP of parameters, and in float32 4P of gradients, two moments (8P), a master copy if the compute dtype is
bf16 (4P), the anchor (4P); a frozen embedding has only its parameters. ZeRO divides these among the processes
(Rajbhandari et al., arXiv 1910.02054, section 5); DeepSpeed 0.19.8 allocates these parts:

    stage 1   masters, moments and anchor / W. Gradients whole, in float32, and beside them, until the update, in bf16
              as autograd returns them; a bucket of them in float32 to be sent. Masters in float32 runs too.
    stage 2   gradients / W too (those in bf16 are whole between micro-batches); a bucket that is being filled, and one
              in float32 to be sent.
    stage 3   parameters / W too, and gathered ones: the embedding and the head for the whole step, the blocks that are
              needed again within 1e9 parameters (`stage3_max_reuse_distance`), prefetched ones. Two buckets in float32,
              or as large as the head, which is sent alone if no bucket holds it.
    offload   "optimizer": masters, moments, anchor and the process's part of the gradients in host memory; from stage 2
              on the device has one parameter's gradient at a time. "all" (stage 3): the part of the parameters too.

Temporary memory is counted at the moments that can be the peak:

    loss      the end of the forward pass: all activations, the head's float32 gradient, which the forward pass
              computes, dx, and a chunk of logits
    widen     with ZeRO, the beginning of the backward pass: the head's gradient, dx, and dx again in float32
    scale     with ZeRO after that: the head's gradient before and after scaling, dx twice
    last      the last block's backward pass, at the feed-forward layer's activation
    first     the same for the first block
    update    with ZeRO or on a CPU, the embedding's gradient beside the one that it is added to; the update itself
              needs less

Gradients are always allocated: in the local engine they stay where they were a step before.

Activations are the tensors that autograd keeps. Per token and layer: 4 D (both norms' results and inputs), (H + 2K) Q
of the projection, (H + K) Q rotated, H Q of attention, 2 F (gate and up), all of a bytes, and a few float32 numbers;
once 2 D. A CPU's own attention keeps nothing rotated, except with QK-norm. Blocks that are checkpointed "full" each
keep their 2 D inputs (D if norms come after the layers), "selective" also the results of its matmuls and of attention;
the block in its backward pass is whole. On a CPU without a kernel for it, documents cost a mask of T x T per sequence
and layer, a window one of T x T per layer.

In fp8 each wide enough weight exists in both layouts beside its own, 2 bytes per number, from the first micro-batch on
(with ZeRO one layout from forward to backward pass). The input of such a layer is kept as one byte per number: instead
of the tensors that the layers before attention and SwiGLU would keep, and in addition to them in the others.

A norm's weight gradient is kept in parts until the end of the step, one for each program that a GPU of SMS
multiprocessors runs. A step recorded as a CUDA graph has its own temporary memory, so that evaluations and steps of
other shapes need theirs in addition: "recording" is as much again, if a recipe asks for graphs. `cuda_graphs: auto`
records only if there is room for it.

In float32, our own matmuls on a CPU (kernels/matmul.py) copy their right factor: the head's weights beside the logits,
a feed-forward layer's activation beside the gradients of its weights.

Left out: the memory of CUDA itself, cuBLAS and NCCL (0.5 to 2 GB), the allocator's rounding and fragments, evaluation
(less than a step).
"""

from __future__ import annotations

import torch

from spt_fast.kernels import attention_cpu, cross_entropy, matmul, norm
from spt_fast.model.config import GPTConfig
from spt_fast.model.flops import block_matrices, parameters
from spt_fast.model.gpt import gains_by_fp8
from spt_fast.model.parameters import of_block, table

CHECKPOINTING = ("none", "selective", "full")
DISTRIBUTIONS = (
    *((stage, "none") for stage in (0, 1, 2, 3)),
    *((stage, "optimizer") for stage in (1, 2, 3)),
    (3, "all"),
)
"""All pairs (ZeRO stage, offload)."""

REDUCE_BUCKET = 50_000_000
"""Numbers that ZeRO sends at once: 200 MB in float32; DeepSpeed's default would hold 2 GB and more."""
SMS = 132
"""Of an H100."""
STAGE_3_PREFETCH, STAGE_3_REUSE = 50_000_000, 1_000_000_000
"""DeepSpeed's defaults, in numbers: stage3_prefetch_bucket_size, stage3_max_reuse_distance."""


def memory_bytes(
    config: GPTConfig,
    micro: int,
    *,
    dtype: torch.dtype,
    context: int | None = None,
    checkpointing: str = "none",
    micro_batches: int = 1,
    documents: bool = False,
    states: int = 2,
    hidden_states: int | None = None,
    anchor: bool = False,
    freeze: str = "none",
    device: str = "cuda",
    stage: int = 0,
    world: int = 1,
    offload: str = "none",
    fp8: bool = False,
    recorded: bool = False,
) -> dict[str, int]:
    """Bytes of a step of `micro_batches` times `micro` sequences in one of `world` processes, at its peak.

    dtype: of parameters and computation, bfloat16 or float32. context: T, by default the model's. states: numbers that
    the optimizer keeps for each parameter; hidden_states: for each of a block's matrices, if these differ.
    fp8, recorded: whether wide layers multiply in fp8, and whether steps are recorded as CUDA graphs.
    device: "cuda" or "cpu". stage, offload: of ZeRO; stage 0 is the local engine. For a phase that unties a tied model
    pass `replace(config, tied=False)`. freeze: as in the recipe's phase.
    Keys: parameters, gradients, optimizer, activations, logits (further memory of the loss and the head's gradient),
    communication (buckets), recording, and their sum `total`, on the device; `host`, the offloaded part.
    """
    assert (stage, offload) in DISTRIBUTIONS, (stage, offload)
    D, V, F, L, a = config.width, config.vocab_size, config.ffn, config.layers, dtype.itemsize
    P, head, block = parameters(config), V * D, block_matrices(config) // L
    learning = P - (head if freeze == "embeddings" else 0)
    T = context or config.context
    tokens = micro * T

    # Permanent memory; gradients at their maximum, when they are accumulated.
    states_of, gradients_of, parameters_of = (1 if stage < first else world for first in (1, 2, 3))
    masters = 4 if a < 4 or stage in (1, 2) else 0
    hidden = block_matrices(config) if hidden_states is not None else 0
    kept = states * (learning - hidden) + (hidden_states or 0) * hidden
    optimizer = ((masters + (4 if anchor else 0)) * learning + 4 * kept) // states_of
    gradients, own = 4 * learning // gradients_of, a * P // parameters_of
    host = gathered = 0
    if offload != "none":
        largest = a * max(row.size for row in table(config).values())
        host, optimizer = optimizer + 4 * learning // world, 0
        if stage < 3:  # gradients on their way to the update and parameters on their way back, in the compute dtype
            host += 2 * a * learning // world + largest
        if stage >= 2:
            gradients = largest
    if offload == "all":
        host, own = host + own, 0
    if stage == 3:
        root = head if config.tied else 2 * head
        gathered = a * min(P, root + block + STAGE_3_PREFETCH + STAGE_3_REUSE // 2)
    bucket = min(REDUCE_BUCKET, learning)
    filling = a * bucket * (2 if device == "cuda" else 1)  # one more, as messages overlap with the computation
    buckets = (4 * bucket if world > 1 else 0, 4 * bucket, filling + 4 * bucket, 8 * max(bucket, head))[stage]

    # Gradients at each moment. ZeRO accumulates its own beside autograd's.
    made = 4 if stage == 0 else a
    made_head = made * head
    beside = a * learning if a < 4 and (stage == 2 or (stage == 1 and offload == "none")) else 0
    before = gradients + (beside if micro_batches > 1 else 0)
    at_update = gradients + (beside if stage == 1 else 0)
    waiting = made_head if stage else 0  # the head's, until the embedding's is added
    adds_apart = stage > 0 or (device == "cpu" and (micro_batches > 1 or config.tied))
    added = made_head if learning == P and adds_apart else 0

    kept, whole = _of_a_block(config, micro, T, dtype, device, checkpointing, documents)
    in_fp8 = [row for row in of_block(config) if fp8 and row.kind.multiplies and gains_by_fp8(row.shape)]
    read = sum(row.shape[1] for row in in_fp8)
    read_alone = a * D * sum(row.name in ("wqkv", "w_gate_up") for row in in_fp8)  # not kept by any other layer
    kept += {"none": read - read_alone, "selective": read, "full": 0}[checkpointing]
    whole += read - read_alone
    layouts = L * sum(2 * row.size + 4 * sum(row.shape) for row in in_fp8)
    own += layouts if stage == 0 else 0
    kept, whole = tokens * kept, tokens * max(kept, whole)
    x, activation = tokens * D * a, tokens * 3 * F * a
    once = x + 16 * tokens * micro_batches + 8 * config.head_dim * (T + (tokens if documents else 0))
    if stage == 0 and device == "cuda":
        once += 4 * norm.PROGRAMS_PER_SM * SMS * D * (2 * L + 1)
    if stage > 0 and checkpointing == "none":
        once += layouts // 2
    packs = device == "cpu" and a == 4 and matmul.PAYS
    logits = _chunk_of_logits(tokens, V, dtype, device) + (a * head if device == "cpu" and (a < 4 or packs) else 0)
    right = a * tokens * F if packs else 0
    moments = {
        "last": (before, once + (L - 1) * kept + whole + activation, waiting + right),
        "first": (before, once + whole + activation, waiting + right),
        "update": (at_update, once, waiting + added),
    }
    if stage == 0:
        moments["loss"] = before, once + L * kept + x, x + logits
    else:
        moments["loss"] = before, once + L * kept + x, 4 * head + x + logits
        moments["widen"] = before, once + L * kept, 4 * head + x + 4 * tokens * D + (x if a < 4 else 0)
        moments["scale"] = before, once + L * kept, 4 * head + 2 * x + made_head
    at_peak = dict(zip(("gradients", "activations", "logits"), max(moments.values(), key=sum), strict=True))
    recording = at_peak["activations"] + at_peak["logits"] if recorded and stage == 0 else 0
    on_device = {"parameters": own + gathered, "optimizer": optimizer, "communication": buckets, **at_peak}
    on_device["recording"] = recording
    return {**on_device, "total": sum(on_device.values()), "host": host}


def _chunk_of_logits(tokens: int, vocab_size: int, dtype: torch.dtype, device: str) -> int:
    x = torch.empty(tokens, 0, dtype=dtype, device="cpu" if device == "cpu" else "meta")
    return dtype.itemsize * vocab_size * min(tokens, cross_entropy._chunk_rows(x, vocab_size))


def _of_a_block(
    config: GPTConfig, micro: int, T: int, dtype: torch.dtype, device: str, checkpointing: str, documents: bool
) -> tuple[int, int]:
    """Bytes per token that a block keeps until its backward pass, and that it has then, on average."""
    D, H, K, Q, F, a = config.width, config.heads, config.kv_heads, config.head_dim, config.ffn, dtype.itemsize
    L, inputs = config.layers, D if config.norms == "after" else 2 * D  # the stream, and a norm of it
    projected, attended = (H + 2 * K) * Q, H * Q
    simple = device == "cpu" and attention_cpu.obstacle(torch.empty(0, 0, 0, Q, dtype=dtype), True)
    unrotated = device == "cpu" and not simple and not config.qk_norm
    rotated = 0 if unrotated else (H + K) * Q * (L - len(config.no_rope_layers)) // L
    whole = a * (4 * D + projected + rotated + attended + 2 * F) + 4 * (H + 2)
    results = a * (inputs + 2 * D + projected + attended + 2 * F) + 4 * H
    if simple and documents:
        # q, k, v and the result exist with and without padding; v of the projection is not needed then.
        whole += 4 * T + a * (attended + K * Q - (0 if config.qk_norm else projected))
    elif documents or device == "cpu":
        whole, results = whole + 8, results + 8  # the positions of each query's keys
    if simple and not documents and config.window and config.window < T:
        whole += a * T * (L - len(config.full_layers)) // (L * micro)
    return {"none": whole, "selective": results, "full": a * inputs}[checkpointing], whole
