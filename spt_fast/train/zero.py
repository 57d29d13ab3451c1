"""The engine for many processes, or for state larger than one GPU's memory: DeepSpeed ZeRO, stages 0 to 3.

DeepSpeed moves gradients and parameters between processes and partitions the state; the update is the recipe's
optimizer, on ZeRO's flat float32 partitions, or at stage 0 on whole parameters. Whenever training starts, from a
phase's first weights or from a checkpoint, model and DeepSpeed engine are built again; masters, state and anchor are
then set tensor by tensor, independent of any earlier partition.

Stage 0 keeps everything in every process; 1 partitions masters and moments (and the anchor); 2 the gradients too; 3 the
parameters too (Rajbhandari et al., arXiv 1910.02054).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from spt_fast.config import Engine, Phase
from spt_fast.data.loader import Batch
from spt_fast.errors import RecipeError, counted, invalid, shown
from spt_fast.kernels import keep_freed_memory, return_freed_memory
from spt_fast.model.gpt import GPT
from spt_fast.model.memory import REDUCE_BUCKET
from spt_fast.model.parameters import Parameter, table
from spt_fast.optimizers import Group, Optimizer, Update
from spt_fast.train.engine import StepResult
from spt_fast.train.optim import FROZEN, ModelOptimizer
from spt_fast.train.snapshot import COUNT, WEIGHTS, Snapshot, kind_and_name, tensor_name
from spt_fast.train.world import World

ANCHOR = "anchor"
"""The anchor's name among the optimizer's kinds of state."""

PERSISTENT_NUMBERS = 100_000
"""Stage 3 keeps parameters up to this size whole, norms included, since a block reads that of the next block."""


class ZeroEngine:
    """One process of many, each with its share of the global batch. The interface of LocalEngine."""

    def __init__(self, model: GPT, settings: Engine, *, world: World, dtype: torch.dtype) -> None:
        self.deepspeed = _deepspeed()
        if world.device.type == "cpu":
            return_freed_memory()
        self.world, self.device, self.dtype = world, world.device, dtype
        self.settings = settings
        self.config = model.config
        self._flags = {"checkpointing": model.checkpointing, "fp8": model.fp8}
        self._engine: Any = None

    def describe(self) -> str:
        return f"{self.device.type}, {counted(self.world.size, 'process')}, ZeRO stage {self.settings.stage}"

    def untie(self) -> None:
        self.config = dataclasses.replace(self.config, tied=False)

    def begin(self, phase: Phase, start: Snapshot, *, current: Snapshot | None = None, micro_batches: int = 1) -> None:
        self._release()
        snapshot = start if current is None else current
        self.frozen = snapshot.only(FROZEN[phase.freeze])
        config = self._deepspeed_config(phase.optimizer, micro_batches)
        model = self._model(snapshot, phase.freeze, config)
        self.optimizer: Any
        if phase.optimizer.whole_matrices:
            self.optimizer = Dealt(model, phase.optimizer, phase.anchor, self.world)
        elif self.settings.stage == 0:
            self.optimizer = Whole(model, phase.optimizer, phase.anchor)
        else:
            self.optimizer = Partitioned(model, phase.optimizer, phase.anchor)
        with contextlib.redirect_stdout(io.StringIO()):  # suppresses its tables of memory
            self._engine, *_ = self.deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=config,
                dist_init_required=False,
            )
        self._restore(snapshot, start)
        if self.device.type == "cpu":
            keep_freed_memory()

    def step(self, micro_batches: Sequence[Batch], lr: float, interrupted: Callable[[], bool]) -> StepResult | None:
        loss = torch.zeros((), device=self.device)
        self.optimizer.lr = lr
        for batch in micro_batches:
            if interrupted():
                return None
            micro_loss = self._engine(batch.tokens, batch.targets, batch.cu_seqlens)
            loss += micro_loss.detach()
            known = 1 + 0 * micro_loss.detach()  # NaN for a loss that isn't finite: its gradient may be
            self._engine.backward(micro_loss * known)
            self._engine.step()
        self.world.sum_(loss)
        norm, skipped = self.optimizer.norm, self.optimizer.skipped
        if isinstance(self.optimizer, Partitioned):
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)
            skipped = torch.tensor(not self._engine.was_step_applied(), device=self.device)
            self.optimizer.count += 1 - skipped.float()
        return StepResult(torch.stack([loss / (len(micro_batches) * self.world.size), norm, skipped.float()]))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(self.device)
        return self._engine.module(tokens_BT.to(self.device), targets_BT.to(self.device), cu_seqlens, "none").float()

    def logits(self, tokens_BT: Tensor) -> Tensor:
        return self._engine.module(tokens_BT.to(self.device))

    @torch.no_grad()
    def snapshot(self, *, state: bool) -> Snapshot:
        settings, known = self.optimizer.settings, table(self.config)
        every = {tensor_name(WEIGHTS, name): (WEIGHTS, name) for name in self.optimizer.params}
        for name in self.optimizer.params if state else ():
            every |= {tensor_name(kind, name): (kind, name) for kind in settings.kinds_of(known[name].kind.hidden)}
        mine = self.world.share(every)
        taken: dict[str, Tensor] = {}
        for given, (kind, name) in sorted(every.items()):
            whole = self.optimizer.read(kind, name)
            if given in mine:
                taken[given] = whole.detach().to("cpu", torch.float32, copy=True)
        if state and self.world.is_first:
            taken[COUNT] = self.optimizer.count.to("cpu", copy=True)
        return Snapshot.of(taken) | (self.frozen if state else self.frozen.without_state())

    # ------------------------------------------------------------------------------------------------ inside

    def _release(self) -> None:
        """Free the model and the state of the previous phase: DeepSpeed's own references outlive its `destroy`."""
        if self._engine is None:
            return
        from deepspeed.runtime.zero import parameter_offload

        self._engine.destroy()
        for param in self.optimizer.params.values():
            param.grad = None
        self.optimizer.release()
        parameter_offload.FWD_MODULE_STACK.clear()
        self._engine = self.optimizer = None
        gc.collect()

    def _model(self, snapshot: Snapshot, freeze: str, config: dict[str, Any]) -> GPT:
        """Whole parameters in every process; at stage 3 each is partitioned before the next one arrives."""
        model = GPT.without_weights(self.config)
        for flag, value in self._flags.items():
            setattr(model, flag, value)
        for name, tensor in self.world.spread(snapshot.weights):
            param = nn.Parameter(tensor.to(self.device, self.dtype, copy=True), name not in FROZEN[freeze])
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, param)
            if self.settings.stage == 3:
                self.deepspeed.zero.Init(nn.ParameterList([param]), config_dict_or_path=config)
        return model

    @torch.no_grad()
    def _restore(self, snapshot: Snapshot, start: Snapshot) -> None:
        self.optimizer.link(self._engine)
        if self.dtype == torch.float32:  # DeepSpeed's masters are copies of the parameters
            snapshot = dataclasses.replace(snapshot, weights={})
        for given, tensor in self.world.spread(snapshot.tensors()):
            kind, name = kind_and_name(given)
            if kind == COUNT:
                self.optimizer.count.copy_(tensor)
            elif name in self.optimizer.params:
                self.optimizer.write(kind, name, tensor)
        for name, tensor in self.world.spread(start.weights) if self.optimizer.anchor_decay else ():
            if name in self.optimizer.params:
                self.optimizer.write(ANCHOR, name, tensor)

    def _deepspeed_config(self, optimizer: Optimizer, micro_batches: int) -> dict[str, Any]:
        stage, offload = self.settings.stage, self.settings.offload
        if optimizer.whole_matrices:
            stage = 0  # Dealt divides the state
        zero: dict[str, Any] = {
            "stage": stage,
            "overlap_comm": self.device.type == "cuda",
            "reduce_bucket_size": REDUCE_BUCKET,
            "allgather_bucket_size": REDUCE_BUCKET,
        }
        if offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = PERSISTENT_NUMBERS
        ours: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # used only in DeepSpeed's own reports
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": (optimizer.clip or 0.0) if stage > 0 else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
        }
        if self.dtype == torch.bfloat16 and stage > 0:
            ours["bf16"] = {"enabled": True, "check_grad_overflow": True}
            ours["data_types"] = {"grad_accum_dtype": "fp32"}
        return merged(ours, user_config(self.settings.config))


class Partitioned(torch.optim.Optimizer):
    """An optimizer on the flat partitions of ZeRO 1 to 3; ZeRO clips the gradients."""

    def __init__(self, model: GPT, settings: Optimizer, anchor_decay: float) -> None:
        known = table(model.config)
        self.params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        groups: list[dict[str, Any]] = []
        for decayed in (True, False):
            params = [param for name, param in self.params.items() if known[name].kind.decayed == decayed]
            groups += [{"params": part, "decayed": decayed} for part in _eighths(params)]
        super().__init__(groups, {})
        self.settings, self.anchor_decay = settings, anchor_decay
        self.count = torch.zeros((), device=model.embedding.device)
        self.norm = self.skipped = self.count
        self.lr = 0.0

    def link(self, engine: Any) -> None:
        """Make the state of every partition, and let DeepSpeed find each parameter's part in it."""
        zero = engine.optimizer
        kinds = (*self.settings.kinds, *((ANCHOR,) if self.anchor_decay else ()))
        for attribute in (
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
            "fp32_partitioned_groups_flat",
        ):
            for partition in getattr(zero, attribute, ()):
                self.state[partition] = {kind: torch.zeros_like(partition) for kind in kinds}
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._lazy_init_hp_params_optimizer_state()

    def read(self, kind: str, name: str) -> Tensor:
        """The whole tensor of `kind` for a parameter. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        param = self.params[name]
        return safe_get_full_fp32_param(param) if kind == WEIGHTS else safe_get_full_optimizer_state(param, kind)

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        from deepspeed import utils

        param: Any = self.params[name]
        tensor = tensor.to(self.count.device)
        if hasattr(param, "ds_tensor"):  # stage 3, whose setters of whole tensors need sizes that divide evenly
            size, group = param.ds_tensor.numel(), param.ds_process_group
            padding = size * dist.get_world_size(group) - tensor.numel()
            tensor = F.pad(tensor.flatten(), (0, padding)).narrow(0, size * dist.get_rank(group), size)
            write_weights, write_state = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
        else:
            write_weights, write_state = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        write_weights(param, tensor) if kind == WEIGHTS else write_state(param, tensor, kind)

    def release(self) -> None:
        for partition, state in self.state.items():
            state.clear()
            partition.data, partition.grad = partition.data.new_empty(0), None
        self.state.clear()
        self.params.clear()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the partitions that have a gradient; DeepSpeed calls this once for each of them."""
        for group in self.param_groups:
            for partition in group["params"]:
                if partition.grad is None:
                    continue
                state = {kind: [tensor] for kind, tensor in self.state[partition].items()}
                anchors = state.pop(ANCHOR, None)
                decayed = partition.numel() if group["decayed"] else 0
                flat = Group([partition], state, [decayed], anchors=anchors)
                count = (self.count + 1).to(partition.device)
                self.settings.update(flat, Update(count, self.lr, self.anchor_decay))


def _eighths(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in parts, since ZeRO 1 and 2 copy a whole group to one flat tensor before they free it."""
    sizes = torch.tensor([getattr(param, "ds_numel", param.numel()) for param in params])
    ends = sizes.cumsum(0) - 1
    parts: dict[int, list[nn.Parameter]] = {}
    for param, end in zip(params, ends.tolist(), strict=True):
        parts.setdefault(8 * end // int(sizes.sum()), []).append(param)
    return list(parts.values())


class Whole(torch.optim.Optimizer):
    """An optimizer in one process on whole parameters, for DeepSpeed's stage 0: gradients arrive averaged. own: the
    parameters that it updates."""

    def __init__(
        self, model: GPT, settings: Optimizer, anchor_decay: float, own: Callable[[str], bool] = lambda name: True
    ) -> None:
        super().__init__([param for param in model.parameters() if param.requires_grad], {})
        self._inner = ModelOptimizer(model, settings, anchor_decay, own, flat=False)
        self.settings, self.anchor_decay = settings, anchor_decay
        self.params, self.count = self._inner.params, self._inner.count
        self.norm = self.skipped = self.count
        self.lr = 0.0

    def link(self, engine: Any) -> None:
        pass

    def release(self) -> None:
        del self._inner, self.params

    def read(self, kind: str, name: str) -> Tensor:
        inner = self._inner
        return {**inner.state, WEIGHTS: inner.masters, ANCHOR: inner.anchor}[kind][name]

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        self.read(kind, name).copy_(tensor)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.norm = self._inner.grad_norm()
        self.skipped = ~torch.isfinite(self.norm)
        self._inner.step(self.lr, self.norm, self.skipped)


class Dealt(Whole):
    """Stages 0 and 1 for an optimizer that needs whole matrices: each process updates some parameters and sends them to
    the others. Keeping all state everywhere, as stage 0 does, would repeat all updates."""

    def __init__(self, model: GPT, settings: Optimizer, anchor_decay: float, world: World) -> None:
        self._world, self._owners = world, dealt(table(model.config), world.size)
        super().__init__(model, settings, anchor_decay, self._owns)
        sizes = {name: param.numel() for name, param in self.params.items()}
        self._messages = [
            (owner, names)
            for owner in range(world.size)
            for names in _up_to(REDUCE_BUCKET, {n: size for n, size in sizes.items() if self._owners[n] == owner})
        ]

    def _owns(self, name: str) -> bool:
        return self._owners[name] == self._world.rank

    def read(self, kind: str, name: str) -> Tensor:
        """The whole tensor of `kind` for a parameter. Collective."""
        param = self.params[name]
        tensor = super().read(kind, name) if self._owns(name) else param.new_empty(param.shape, dtype=torch.float32)
        dist.broadcast(tensor, src=self._owners[name])
        return tensor

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        if self._owns(name):
            super().read(kind, name).copy_(tensor)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        for owner, names in self._messages:
            tensors = [self.params[name].detach() for name in names]
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.broadcast(flat, src=owner)
            if owner != self._world.rank:
                for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                    tensor.copy_(values.view_as(tensor))


def dealt(rows: Mapping[str, Parameter], processes: int) -> dict[str, int]:
    """The process of each parameter: the largest first, always to the one with the least."""
    held = [0] * processes
    owners = {}
    for name in sorted(rows, key=lambda name: (-rows[name].size, name)):
        owners[name] = held.index(min(held))
        held[owners[name]] += rows[name].size
    return owners


def _up_to(most: int, sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in order, in parts of up to this many numbers, or of one name."""
    part: list[str] = []
    for name, size in sizes.items():
        if part and sum(sizes[other] for other in part) + size > most:
            yield part
            part = []
        part.append(name)
    if part:
        yield part


def check_deepspeed(settings: Engine) -> None:
    """RecipeError if DeepSpeed or the user's JSON cannot be used."""
    _deepspeed()
    merged({}, user_config(settings.config))


def user_config(path: str | None) -> dict[str, Any]:
    """The user's DeepSpeed JSON. RecipeError if it is not an object."""
    if path is None:
        return {}
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"engine.config: {path} cannot be read as JSON ({error})") from None
    if not isinstance(given, dict):
        raise RecipeError(
            invalid(f"engine.config: {path}", given, "write an object, as DeepSpeed's documentation says")
        )
    return given


def merged(ours: Mapping[str, Any], given: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Our DeepSpeed configuration with the user's keys over it. RecipeError for a key that the recipe decides."""
    result = dict(ours)
    for key, value in given.items():
        path, inner = f"{where}{key}", ours.get(key)
        if value == "auto" or (path in DECIDED_BY_RECIPE and (value == inner or value is False or value == "none")):
            continue
        if path in DECIDED_BY_RECIPE:
            raise RecipeError(
                f"engine.config: {path} = {shown(value)}, but {DECIDED_BY_RECIPE[path]} decides it; leave it out there"
            )
        if path in SECTIONS and not isinstance(value, dict):
            raise RecipeError(f"engine.config: {path} = {shown(value)} is invalid: write a section {{…}}")
        result[key] = merged(inner or {}, value, f"{path}.") if path in SECTIONS else value
    return {key: value for key, value in result.items() if value != {}}


DECIDED_BY_RECIPE = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.micro",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "amp.enabled": "precision",
    "torch_autocast.enabled": "precision",
    "zero_optimization.stage": "engine.stage",
    "zero_optimization.offload_optimizer.device": "engine.offload",
    "zero_optimization.offload_param.device": "engine.offload",
    "zero_optimization.stage3_param_persistence_threshold": "spt_fast",
    "zero_allow_untested_optimizer": "spt_fast",
    "zero_force_ds_cpu_optimizer": "spt_fast",
}

SECTIONS = {path.rpartition(".")[0] for path in DECIDED_BY_RECIPE} - {""} | {"data_types"}


def _deepspeed() -> Any:
    """DeepSpeed without its output, and without compiling its shared-memory messages for the CPU, which takes a
    minute."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    warnings.filterwarnings("ignore", r"`torch.distributed\.\w+` is deprecated", FutureWarning)
    try:
        import deepspeed
        from deepspeed import ops
    except ImportError as error:
        raise RecipeError(
            f"engine.name: deepspeed cannot be imported ({error}); `DS_BUILD_OPS=0 pip install deepspeed`, or use "
            "local in one process"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed
