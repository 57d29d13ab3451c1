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
    add       with ZeRO or on a CPU, the embedding's gradient beside the one that it is added to
    update    what the optimizer needs for a moment: Muon's matrices; AdamW nothing

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

from dataclasses import KW_ONLY, astuple, dataclass
from functools import cached_property

import torch

from spt_fast.kernels import attention_cpu, cross_entropy, matmul, norm
from spt_fast.model.config import GPTConfig
from spt_fast.model.flops import block_matrices, parameters
from spt_fast.model.gpt import CHECKPOINTING as CHECKPOINTING
from spt_fast.model.gpt import gains_by_fp8
from spt_fast.model.parameters import Parameter, of_block, table

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


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a step."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    """What the loss and the head's gradient need in addition."""
    communication: int
    """Buckets."""
    recording: int
    total: int
    """The sum of the parts above, which are on the device."""
    host: int
    """The offloaded part."""


@dataclass(frozen=True)
class _Permanent:
    """Bytes between two steps."""

    parameters: int
    gradients: int
    optimizer: int
    host: int


@dataclass(frozen=True)
class _Moment:
    """Bytes at a moment that can be the peak, beyond the permanent ones; gradients include the permanent ones."""

    gradients: int
    activations: int
    logits: int
    optimizer: int = 0


@dataclass(frozen=True)
class Step:
    """A step of `micro_batches` times `micro` sequences in one of `world` processes."""

    config: GPTConfig
    """For a phase that unties a tied model, `replace(config, tied=False)`."""
    micro: int
    _: KW_ONLY
    dtype: torch.dtype
    """Of parameters and computation, bfloat16 or float32."""
    context: int | None = None
    """T, by default the model's."""
    checkpointing: str = "none"
    micro_batches: int = 1
    documents: bool = False
    states: int = 2
    """Numbers that the optimizer keeps for each parameter."""
    hidden_states: int | None = None
    """The same for each of a block's matrices, if it differs."""
    update: int = 0
    """Bytes that the optimizer needs during an update."""
    anchor: bool = False
    freeze: str = "none"
    """As in the recipe's phase."""
    device: str = "cuda"
    """"cuda" or "cpu"."""
    stage: int = 0
    """Of ZeRO; 0 is the local engine."""
    world: int = 1
    offload: str = "none"
    fp8: bool = False
    """Whether wide layers multiply in fp8."""
    recorded: bool = False
    """Whether steps are recorded as CUDA graphs."""

    def __post_init__(self) -> None:
        assert (self.stage, self.offload) in DISTRIBUTIONS, (self.stage, self.offload)

    def memory(self) -> Memory:
        """The bytes of this process when it needs most."""
        permanent = self._permanent()
        peak = max(self._moments(permanent.gradients), key=lambda moment: sum(astuple(moment)))
        parts = {
            "parameters": permanent.parameters,
            "gradients": peak.gradients,
            "optimizer": permanent.optimizer + peak.optimizer,
            "activations": peak.activations,
            "logits": peak.logits,
            "communication": self._buckets(),
            "recording": peak.activations + peak.logits if self.recorded and self.stage == 0 else 0,
        }
        return Memory(**parts, total=sum(parts.values()), host=permanent.host)

    @cached_property
    def _length(self) -> int:
        return self.context or self.config.context

    @cached_property
    def _tokens(self) -> int:
        return self.micro * self._length

    @cached_property
    def _head(self) -> int:
        return self.config.vocab_size * self.config.width

    @cached_property
    def _learning(self) -> int:
        """Parameters that have a gradient."""
        return parameters(self.config) - (self._head if self.freeze == "embeddings" else 0)

    @cached_property
    def _in_fp8(self) -> list[Parameter]:
        """A block's weights that are multiplied in fp8."""
        rows = of_block(self.config) if self.fp8 else []
        return [row for row in rows if row.kind.multiplies and gains_by_fp8(row.shape)]

    @cached_property
    def _layouts(self) -> int:
        """Bytes of all fp8 weights, in both layouts."""
        return self.config.layers * sum(2 * row.size + 4 * sum(row.shape) for row in self._in_fp8)

    def _permanent(self) -> _Permanent:
        P, a, learning, world = parameters(self.config), self.dtype.itemsize, self._learning, self.world
        states_of, gradients_of, parameters_of = (1 if self.stage < first else world for first in (1, 2, 3))
        hidden = 0 if self.hidden_states is None else block_matrices(self.config)
        kept = self.states * (learning - hidden) + (self.hidden_states or 0) * hidden
        masters = 4 if a < 4 or self.stage in (1, 2) else 0
        optimizer = ((masters + (4 if self.anchor else 0)) * learning + 4 * kept) // states_of
        gradients, own = 4 * learning // gradients_of, a * P // parameters_of
        host = 0
        if self.offload != "none":
            largest = a * max(row.size for row in table(self.config).values())
            host, optimizer = optimizer + 4 * learning // world, 0
            if self.stage < 3:  # gradients for the update and updated parameters, in the compute dtype
                host += 2 * a * learning // world + largest
            if self.stage >= 2:
                gradients = largest
        if self.offload == "all":
            host, own = host + own, 0
        if self.stage == 0:
            own += self._layouts
        return _Permanent(own + self._gathered(), gradients, optimizer, host)

    def _gathered(self) -> int:
        """Parameters of other processes that stage 3 holds at once."""
        if self.stage < 3:
            return 0
        root = self._head if self.config.tied else 2 * self._head
        block = block_matrices(self.config) // self.config.layers
        most = root + block + STAGE_3_PREFETCH + STAGE_3_REUSE // 2
        return self.dtype.itemsize * min(parameters(self.config), most)

    def _buckets(self) -> int:
        bucket = min(REDUCE_BUCKET, self._learning)
        # On a GPU messages overlap with the computation, so that one more bucket is being filled.
        filling = self.dtype.itemsize * bucket * (2 if self.device == "cuda" else 1)
        alone = 4 * bucket if self.world > 1 else 0
        return (alone, 4 * bucket, filling + 4 * bucket, 8 * max(bucket, self._head))[self.stage]

    def _moments(self, gradients: int) -> list[_Moment]:
        """Those in the module's docstring; `gradients` are the permanent ones, at their maximum."""
        a, stage, cpu = self.dtype.itemsize, self.stage, self.device == "cpu"
        D, F, L, tokens, head = self.config.width, self.config.ffn, self.config.layers, self._tokens, self._head
        # ZeRO accumulates its own gradients beside autograd's.
        beside = a * self._learning if a < 4 and (stage == 2 or (stage == 1 and self.offload == "none")) else 0
        before = gradients + (beside if self.micro_batches > 1 else 0)
        at_update = gradients + (beside if stage == 1 else 0)
        made_head = (4 if stage == 0 else a) * head
        waiting = made_head if stage else 0  # the head's, until the embedding's is added
        adds_apart = stage > 0 or (cpu and (self.micro_batches > 1 or self.config.tied))
        added = made_head if self.freeze != "embeddings" and adds_apart else 0

        kept, whole = (tokens * size for size in self._of_a_block())
        once, x, activation = self._once(), tokens * D * a, tokens * 3 * F * a
        packs = cpu and a == 4 and matmul.PAYS
        logits = self._chunk_of_logits() + (a * head if cpu and (a < 4 or packs) else 0)
        right = a * tokens * F if packs else 0
        all_kept, one_whole = once + L * kept, once + whole + activation
        moments = [
            _Moment(before, one_whole + (L - 1) * kept, waiting + right),  # last
            _Moment(before, one_whole, waiting + right),  # first
            _Moment(at_update, once, waiting + added),  # add
            _Moment(at_update, 0, 0, self.update),  # update
        ]
        if stage == 0:
            return [*moments, _Moment(before, all_kept + x, x + logits)]  # loss
        widened = x if a < 4 else 0
        return [
            *moments,
            _Moment(before, all_kept + x, 4 * head + x + logits),  # loss
            _Moment(before, all_kept, 4 * head + x + 4 * tokens * D + widened),  # widen
            _Moment(before, all_kept, 4 * head + 2 * x + made_head),  # scale
        ]

    def _once(self) -> int:
        """Activations outside of the blocks."""
        tokens, config = self._tokens, self.config
        once = tokens * config.width * self.dtype.itemsize + 16 * tokens * self.micro_batches
        once += 8 * config.head_dim * (self._length + (tokens if self.documents else 0))
        if self.stage == 0 and self.device == "cuda":
            once += 4 * norm.PROGRAMS_PER_SM * SMS * config.width * (2 * config.layers + 1)
        if self.stage > 0 and self.checkpointing == "none":
            once += self._layouts // 2
        return once

    def _chunk_of_logits(self) -> int:
        device = "cpu" if self.device == "cpu" else "meta"
        x = torch.empty(self._tokens, 0, dtype=self.dtype, device=device)
        V = self.config.vocab_size
        return self.dtype.itemsize * V * min(self._tokens, cross_entropy._chunk_rows(x, V))

    def _of_a_block(self) -> tuple[int, int]:
        """Bytes per token that a block keeps until its backward pass, and that it has then, on average."""
        config, T, a = self.config, self._length, self.dtype.itemsize
        D, H, K, Q, F, L = config.width, config.heads, config.kv_heads, config.head_dim, config.ffn, config.layers
        inputs = D if config.norms == "after" else 2 * D  # the stream, and a norm of it
        projected, attended = (H + 2 * K) * Q, H * Q
        cpu = self.device == "cpu"
        simple = cpu and attention_cpu.obstacle(torch.empty(0, 0, 0, Q, dtype=self.dtype), True)
        unrotated = cpu and not simple and not config.qk_norm
        rotated = 0 if unrotated else (H + K) * Q * (L - len(config.no_rope_layers)) // L
        whole = a * (4 * D + projected + rotated + attended + 2 * F) + 4 * (H + 2)
        results = a * (inputs + 2 * D + projected + attended + 2 * F) + 4 * H
        if simple and self.documents:
            # q, k, v and the result exist with and without padding; v of the projection is not needed then.
            whole += 4 * T + a * (attended + K * Q - (0 if config.qk_norm else projected))
        elif self.documents or cpu:
            whole, results = whole + 8, results + 8  # the positions of each query's keys
        if simple and not self.documents and config.window and config.window < T:
            whole += a * T * (L - len(config.full_layers)) // (L * self.micro)
        kept = {"none": whole, "selective": results, "full": a * inputs}[self.checkpointing]

        read = sum(row.shape[1] for row in self._in_fp8)
        read_alone = a * D * sum(row.name in ("wqkv", "w_gate_up") for row in self._in_fp8)  # kept by no other layer
        kept += {"none": read - read_alone, "selective": read, "full": 0}[self.checkpointing]
        return kept, max(kept, whole + read - read_alone)
