"""DoGE, domain reweighting with generalization estimation (Fan, Pagliardini, Jaggi; arXiv 2310.15393): the mixture of
sources that is best for all of them, or for a target, learned in one run of a small proxy model.

A source gets more weight if a step on it lowers the loss on the others, that is, if its gradient is aligned with
theirs. The weights w over K sources start uniform. In each step, at the learning rate η of the proxy's schedule:

    g_j    the gradient on windows of source j, clipped to `optimizer.clip`
    s_j    η·⟨g_j, Σ_{i≠j} g_i⟩ / mean‖g‖        without a target: how much it helps the other sources
           η·⟨g_j, g_target⟩ / mean‖g‖            with a target, which is read but never trained on
    w_j    ∝ w_j·exp(clip(s_j, 0, 5η) / μ)         μ = 0.01, with a target 0.05
    θ      one step of AdamW on Σ_j w_j·g_j

The result is the average of w over all steps. Inner products are over all parameters, in fp32. The limits of the
scores, μ, and the division by the mean norm of the K clipped gradients are those of the authors' code, Olivia-fsm/DoGE
on GitHub. (Their code means to leave out i = j, as we do, but keeps it: it compares sets of tensors, which are never
equal.)

The *reach* Σ η/μ bounds how far weights can move: over a run, log w_a - log w_b changes by the reach times the mean
difference of their alignments ⟨g_j, …⟩/mean‖g‖, if none is clipped. A short proxy run therefore ends near equal shares
for any sources: use its scores instead of its weights, or train longer.

The proxy run is the first phase of a recipe without its evaluations, grid and early stopping. Every source (and the
target) reads `batch.sequences` windows in each step, so a step costs as much as K steps of the recipe (K + 1 with a
target). It needs memory for K + 1 (K + 2) more copies of the parameters in fp32. It runs in one process; of `engine`,
only checkpointing, fp8 and deterministic apply.

Legend: K sources that are trained on, R = K or, with a target, K + 1 rows, N parameters.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from torch import Tensor

from spt_fast.config import Recipe, recipe_from
from spt_fast.data.loader import Batch, Loader
from spt_fast.data.mixture import Mixture
from spt_fast.errors import CheckpointError, RecipeError, counted, invalid, nearest
from spt_fast.files import write_text
from spt_fast.model.flops import parameters
from spt_fast.printing import as_json, print_note, print_table
from spt_fast.progress import Steps
from spt_fast.train import checkpoint
from spt_fast.train.checkpoint import Checkpoint, Retention
from spt_fast.train.folder import is_begun, owned
from spt_fast.train.health import MAX_SKIPPED_IN_A_ROW, Diverged, too_many_skipped
from spt_fast.train.local import LocalEngine
from spt_fast.train.lr import learning_rate
from spt_fast.train.plan import Plan, make_plan
from spt_fast.train.precision import precision_of
from spt_fast.train.resume import shape_of
from spt_fast.train.signals import StopRequest
from spt_fast.train.snapshot import Snapshot, weights_of
from spt_fast.train.world import ALONE, World, dtype_name, pick_device, use_deterministic_algorithms

MU_UNIVERSAL = 0.01
MU_TARGET = 0.05
SCORE_LIMIT = 5.0
"""The largest score, in multiples of the learning rate."""
PUBLISHED_RATES = 2.975
"""Σ η of the authors' configuration: 10,000 steps, 500 of them warm-up to 5e-4, then a cosine to 1e-4."""


@dataclass(frozen=True)
class Point:
    """A step of the trajectory. Weights and scores are by source; losses, in nats per token, also of the target."""

    step: int
    lr: float
    weights: dict[str, float]
    scores: dict[str, float]
    losses: dict[str, float]


@dataclass(frozen=True)
class Settings:
    """The inputs that the weights depend on."""

    parameters: int
    steps: int
    tokens_per_source: int
    mu: float
    score_limit: float
    lr: float
    clip: float | None
    seed: int
    precision: str
    device: str
    data: dict[str, str]
    """Digests of the datasets, by field of the recipe."""


@dataclass(frozen=True, kw_only=True)
class Reweighting:
    """The content of weights.json. Mappings are by source; the target has only epochs and losses."""

    status: str = "done"
    target: str | None
    weights: dict[str, float]
    """Weights averaged over all steps."""
    mixture: dict[str, str]
    """The weights in percent for a recipe, rounded to tenths that sum to exactly 100."""
    last_weights: dict[str, float]
    """Weights after the last step."""
    scores: dict[str, float]
    """Mean scores before clipping."""
    clipped: dict[str, float]
    """The share of steps in which the score was clipped."""
    reach: float
    published_reach: float
    """The reach of the authors' configuration."""
    epochs: dict[str, float]
    """How often each source was read."""
    settings: Settings
    skipped: int
    """The number of steps that were skipped, because a loss or gradient was not finite."""
    seconds: float
    trajectory: list[Point]
    """The first and the last step, and one per `log.every`."""

    @classmethod
    def read(cls, path: Path) -> Reweighting:
        """Read weights.json."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        points = [Point(**point) for point in raw["trajectory"]]
        return cls(**raw | {"settings": Settings(**raw["settings"]), "trajectory": points})


@dataclass(frozen=True)
class Stopped:
    """The result of a run that a signal ended after a checkpoint."""

    reason: str | None
    """The name of the signal."""


def reweight(
    recipe: Recipe, out: Path, *, target: str | None = None, resume: bool = False, progress: bool = True
) -> Reweighting | Stopped:
    """Learn weights for the sources of the recipe's first phase (except the target), and write OUT/weights.json.

    SIGTERM, SIGINT or SIGUSR1 end it after a checkpoint. `resume` continues from that with the same bits, or starts
    from the beginning without one. Raises RecipeError, DataError or CheckpointError.
    """
    sources = _sources(recipe, target)
    if recipe.engine.deterministic:
        use_deterministic_algorithms()
    begun, done = out / "reweight.json", out / "weights.json"
    if is_begun(out, "out", begun.name, lambda: _changes(begun, recipe, target), resume=resume) and done.exists():
        with _readable(out):
            return Reweighting.read(done)
    with owned(out, "out"):
        return _reweight(recipe, sources, out, target=target, resume=resume, progress=progress)


def _reweight(
    recipe: Recipe, sources: list[str], out: Path, *, target: str | None, resume: bool, progress: bool
) -> Reweighting | Stopped:
    """`reweight`, in a locked folder."""
    begun, done = out / "reweight.json", out / "weights.json"
    plan = make_plan(recipe)
    found = checkpoint.newest(out / "checkpoints") if resume else None
    if found:
        plan.check_same_data(found.state["data"], found.path)
    plan.check_files(None, verify=False)
    write_text(begun, json.dumps({"recipe": recipe.plain(), "target": target}, indent=1))
    with StopRequest() as stop, Steps(show=progress) as display:
        study = _Study(plan, sources, target, out, found, display)
        if not study.run(stop):
            return Stopped(stop.signal)
    skipped, steps = study.state.step - study.state.counted, study.state.step
    if too_many_skipped(skipped, steps):
        raise Diverged(
            f"{skipped} of {counted(steps, 'step', 'were')} skipped, because a loss or gradient was not finite; "
            "lower optimizer.lr or lengthen schedule.warmup, and give another folder"
        )
    result = study.result()
    write_text(done, json.dumps(as_json(result), indent=1))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # the proxy model is no longer needed
    return result


def _changes(begun: Path, recipe: Recipe, target: str | None) -> list[str]:
    """The differences from the recipe and target that the folder was started with."""
    with _readable(begun.parent):
        before = json.loads(begun.read_text(encoding="utf-8"))
        retargeted = [f"target: {before['target']} → {target}"] if before["target"] != target else []
        return recipe_from(before["recipe"]).changes(recipe, shape_of(recipe)) + retargeted


@contextmanager
def _readable(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{out}: is damaged ({error}); choose another folder to start again") from None


def alignments(gram: np.ndarray, *, target: bool) -> np.ndarray:
    """fp64 [K]: the scores divided by the learning rate.

    gram    fp64 [R, R]: inner products of the gradients
    target  whether the last row is the target's
    """
    trained = len(gram) - target
    helped = gram[:trained, -1] if target else gram.sum(axis=1) - gram.diagonal()
    return helped / (np.sqrt(gram.diagonal()[:trained]).mean() + 1e-6)


def reweighted(weights: np.ndarray, scores: np.ndarray, mu: float) -> np.ndarray:
    """fp64 [K]: the weights after a step, softmax(log w + score / μ)."""
    logits = np.log(weights) + scores / mu
    raised = np.exp(logits - logits.max())
    return np.maximum(raised / raised.sum(), np.finfo(np.float64).tiny)  # a weight of 0 could never rise again


def percentages(weights: Mapping[str, float]) -> dict[str, str]:
    """Weights that sum to 1 as percentages with one decimal that sum to exactly 100%, by largest remainder."""
    tenths = {source: int(weight * 1000) for source, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda source: tenths[source] - weights[source] * 1000)
    for source in by_remainder[: 1000 - sum(tenths.values())]:
        tenths[source] += 1
    return {source: f"{parts // 10}.{parts % 10}%" for source, parts in tenths.items()}


def mixture_line(mixture: Mapping[str, str]) -> str:
    """A line of YAML for the phase of a recipe: `mixture: {general: 61.2%, web: 38.8%}`."""
    flow = yaml.safe_dump(dict(mixture), default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
    return f"mixture: {flow.strip()}"


def _sources(recipe: Recipe, target: str | None) -> list[str]:
    if target is not None and target not in recipe.sources:
        raise RecipeError(invalid("target", target, f"name a source; {nearest(target, recipe.sources)}"), argument=True)
    phase = recipe.phases[0]
    if phase.freeze != "none":
        raise RecipeError(f"phases[{phase.name}].freeze: scores need whole gradients; leave it out")
    sources = sorted(source for source, share in phase.mixture.items() if share and source != target)
    if len(sources) < 2:
        besides = "" if target is None else f" besides the target {target!r}"
        raise RecipeError(
            f"phases[{phase.name}].mixture: names {len(sources)} source{besides}; weighting needs at least two, so add "
            "some (their shares are not used)"
        )
    return sources


@dataclass
class _State:
    """The state without the proxy's tensors. Lists are by source, in the order of the names."""

    weights: list[float]
    weight_sums: list[float]
    score_sums: list[float]
    clipped: list[int]
    lr_sum: float = 0.0
    step: int = 0
    counted: int = 0
    """Steps that were not skipped."""
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    trajectory: list[Point] = field(default_factory=list)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> _State:
        """The state in a checkpoint."""
        return cls(**saved | {"trajectory": [Point(**point) for point in saved["trajectory"]]})

    @classmethod
    def uniform(cls, sources: int) -> _State:
        return cls([1 / sources] * sources, [0.0] * sources, [0.0] * sources, [0] * sources)


class _Proxy:
    """The proxy model, and the gradients of all rows: sources, and the target last."""

    def __init__(self, plan: Plan, rows: int, dtype: torch.dtype, current: Snapshot | None) -> None:
        phase = plan.phases[0].phase
        model = plan.starting_model()
        if phase.untie:
            model.untie()
        start = weights_of(model)
        self.engine = LocalEngine(model, device=pick_device(), dtype=dtype)
        self.engine.begin(phase, start, current=current)
        self.params = list(self.engine.model.parameters())
        count = sum(param.numel() for param in self.params)
        self.gradients_RN = torch.zeros(rows, count, dtype=torch.float32, device=self.engine.device)

    def measure(
        self, batches: Sequence[Sequence[Batch]], interrupted: Callable[[], bool]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """(inner products of the rows' gradients [R, R], their losses [R]), both fp64; None if interrupted."""
        losses_R = torch.zeros(len(batches), device=self.engine.device)
        self.gradients_RN.zero_()
        for row, micro_batches in enumerate(batches):
            self._point_to(self.gradients_RN[row])
            for batch in micro_batches:
                if interrupted():
                    return None
                loss = self.engine.model(batch.tokens, batch.targets, batch.cu_seqlens) / len(micro_batches)
                loss.backward()
                losses_R[row] += loss.detach()
        gram_RR = self.gradients_RN @ self.gradients_RN.T
        return gram_RR.double().cpu().numpy(), losses_R.double().cpu().numpy()

    def step(self, weights: np.ndarray, lr: float) -> None:
        """One optimizer step on the weighted sum of the first K gradients."""
        weights_K = torch.from_numpy(weights).to(self.gradients_RN)
        combined_N = weights_K @ self.gradients_RN[: len(weights)]
        self._point_to(combined_N)
        never = torch.zeros((), dtype=torch.bool, device=self.engine.device)
        self.engine.optimizer.step(lr, torch.linalg.vector_norm(combined_N), never)

    def _point_to(self, flat_N: Tensor) -> None:
        """Make the parameters' gradients views of `flat_N`, to which the backward pass adds in place."""
        parts = flat_N.split([param.numel() for param in self.params])
        for param, part in zip(self.params, parts, strict=True):
            param.grad = part.view(param.shape)


class _Study:
    """The steps of a reweighting, starting from the newest checkpoint."""

    def __init__(
        self, plan: Plan, sources: list[str], target: str | None, out: Path, found: Checkpoint | None, display: Steps
    ) -> None:
        self.plan, self.sources, self.target, self.display = plan, sources, target, display
        self.rows = sources if target is None else [*sources, target]
        self.phase = plan.phases[0]
        self.mu = MU_UNIVERSAL if target is None else MU_TARGET
        self.save_every, self.log_every = (
            span.steps(self.phase.tokens_per_step, self.phase.steps)
            for span in (plan.recipe.checkpoint.every, plan.recipe.log.every)
        )
        self.state, self.saved_step = _State.uniform(len(sources)), -1
        current = None
        if found:
            self.state = _State.of(found.state["study"])
            self.saved_step = self.state.step
            self.dtype, current = getattr(torch, found.state["dtype"]), checkpoint.load(found.path)["current"]
            for reason in found.skipped.values():
                display.say(f"skipped a damaged checkpoint: {reason}")
            checkpoint.set_aside(found.skipped)
        else:
            precision = precision_of(plan.recipe, pick_device(), plan.model)
            self.dtype = precision.dtype
            display.say(f"precision: {precision}")
        self.proxy = _Proxy(plan, len(self.rows), self.dtype, current)
        self.writer = checkpoint.Writer(out / "checkpoints", ALONE, Retention(plan.recipe.checkpoint.keep))

    def run(self, stop: StopRequest) -> bool:
        """Run all remaining steps; returns False, after a checkpoint, if a stop was requested."""
        state, steps = self.state, self.phase.steps
        began, seconds_before, finished = time.monotonic(), state.seconds, True
        self.display.begin("reweight", state.step, steps)
        with ExitStack() as open_:
            loaders = [open_.enter_context(self._loader(source)) for source in self.rows]
            for turns in zip(*loaders, strict=True):
                measured = self.proxy.measure([micro_batches for _, micro_batches in turns], stop)
                if measured is None:
                    finished = False
                    break
                self._advance(*measured)
                state.seconds = seconds_before + time.monotonic() - began
                self.display.advance(state.step)
                if state.step % self.log_every == 0 or state.step == steps:
                    weights = self._by_source(state.weights).items()
                    self.display.show(state.step, [" ".join(f"{source} {weight:.1%}" for source, weight in weights)])
                if state.step % self.save_every == 0 and state.step < steps:
                    self._save()
        # the only copy of this position is not replaced by itself
        if not finished and state.step != self.saved_step:
            self._save()
        self.writer.finish()
        return finished

    def _advance(self, gram: np.ndarray, losses: np.ndarray) -> None:
        """Update the weights, then the proxy with them. If a value is not finite, both stay unchanged."""
        state, phase, sources = self.state, self.phase.phase, len(self.sources)
        lr = learning_rate(phase.schedule, phase.optimizer.lr, state.step, self.phase.steps, self.phase.tokens_per_step)
        state.step += 1
        if not (np.isfinite(gram).all() and np.isfinite(losses).all()):
            if state.step - state.counted == 1:
                self.display.say(f"warning: step {state.step} was skipped, because a loss or gradient was not finite")
            state.skipped_in_a_row += 1
            if state.skipped_in_a_row >= min(MAX_SKIPPED_IN_A_ROW, self.phase.steps):
                raise RuntimeError(
                    f"a loss or gradient was not finite in the {state.skipped_in_a_row} steps up to {state.step}: "
                    "lower optimizer.lr or lengthen the warm-up"
                )
            return
        state.skipped_in_a_row = 0
        norms = np.sqrt(gram.diagonal())
        scale = np.minimum(1, phase.optimizer.clip / (norms + 1e-6)) if phase.optimizer.clip else np.ones_like(norms)
        scores = alignments(gram * np.outer(scale, scale), target=self.target is not None)
        kept = np.clip(scores, 0, SCORE_LIMIT)
        weights = reweighted(np.array(state.weights), lr * kept, self.mu)
        self.proxy.step(weights * scale[:sources], lr)

        state.counted += 1
        state.lr_sum += lr
        state.weights = weights.tolist()
        state.weight_sums = (np.array(state.weight_sums) + weights).tolist()
        state.score_sums = (np.array(state.score_sums) + lr * scores).tolist()
        state.clipped = (np.array(state.clipped) + (scores != kept)).tolist()
        if state.counted == 1 or state.step == self.phase.steps or state.step % self.log_every == 0:
            by_row = dict(zip(self.rows, losses.tolist(), strict=True))
            scored = self._by_source((lr * scores).tolist())
            state.trajectory.append(Point(state.step, lr, self._by_source(state.weights), scored, by_row))

    def _loader(self, source: str) -> Loader:
        """The windows of one source alone, as the recipe's phase would read them."""
        alone = replace(self.plan, phases=(replace(self.phase, mixture=Mixture({source: 1})),))
        world = World(0, 1, self.proxy.engine.device)
        return alone.loader(0, {source: 0}, world, first_step=self.state.step)

    def _save(self) -> None:
        self.saved_step = self.state.step
        state = {
            "study": asdict(self.state),
            "dtype": dtype_name(self.dtype),
            "data": self.plan.digests(),
        }
        self.writer.save(f"step-{self.state.step:010d}", state, {"current": self.proxy.engine.snapshot(state=True)})

    def _by_source(self, values: Sequence[float], divisor: float = 1) -> dict[str, float]:
        return {source: value / divisor for source, value in zip(self.sources, values, strict=True)}

    def result(self) -> Reweighting:
        state, phase, by_source = self.state, self.phase, self._by_source
        windows = state.step * phase.phase.batch.sequences
        weights = by_source(state.weight_sums, sum(state.weight_sums))
        return Reweighting(
            target=self.target,
            weights=weights,
            mixture=percentages(weights),
            last_weights=by_source(state.weights),
            scores=by_source(state.score_sums, state.counted),
            clipped=by_source(state.clipped, state.counted),
            reach=state.lr_sum / self.mu,
            published_reach=PUBLISHED_RATES / self.mu,
            epochs={source: float(phase.rings[source].epochs(windows)) for source in self.rows},
            settings=Settings(
                parameters=parameters(self.plan.model),
                steps=phase.steps,
                tokens_per_source=windows * phase.context,
                mu=self.mu,
                score_limit=SCORE_LIMIT,
                lr=phase.phase.optimizer.lr,
                clip=phase.phase.optimizer.clip,
                seed=self.plan.recipe.seed,
                precision=dtype_name(self.dtype),
                device=self.proxy.engine.device.type,
                data=self.plan.digests(),
            ),
            skipped=state.step - state.counted,
            seconds=state.seconds,
            trajectory=state.trajectory,
        )


def print_reweighting(result: Reweighting, title: str, console: Console) -> None:
    """Print a row for each source, the reach of the weights, and the line for a recipe."""
    first, last = (result.trajectory[i].losses for i in (0, -1))
    by_source = (result.weights, result.scores, result.clipped)
    print_table(
        console,
        title,
        ["source", "weight", "mean score", "clipped", "epochs", "first loss", "last loss"],
        [
            [source, *(figures.get(source, "target") for figures in by_source), epochs, first[source], last[source]]
            for source, epochs in result.epochs.items()
        ],
    )
    print_note(
        console,
        f"reach {result.reach:.3g} (the paper's: {result.published_reach:.3g}): the smaller it is, the closer shares "
        "stay to equal ones",
    )
    console.print(mixture_line(result.mixture), soft_wrap=True)
