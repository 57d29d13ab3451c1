"""A recipe checked against the data on disk: what every phase will read, before the first step.

`spt-fast plan` prints a `Plan` and the loop trains from one, so both use the same figures.
"""

from __future__ import annotations

import dataclasses
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from spt_fast.config import Phase, Recipe, Source, check_lengths, flat
from spt_fast.data.base_tokenizer import BaseTokenizer
from spt_fast.data.heldout import has_long_documents
from spt_fast.data.loader import Loader
from spt_fast.data.mixture import Mixture
from spt_fast.data.order import SampleOrder, check_every_source_is_drawn
from spt_fast.data.overlap import Overlap, overlap_share
from spt_fast.data.ring import Ring
from spt_fast.data.shards import SAMPLED_BLOCKS, TokenDataset
from spt_fast.data.tokenizer import Tokenizer, check_alike
from spt_fast.errors import DataError, RecipeError, counted, invalid, shown
from spt_fast.fields import naming
from spt_fast.kernels import fp8
from spt_fast.model import hf
from spt_fast.model.flops import train_flops_per_token
from spt_fast.model.gpt import GPT, GPTConfig, drawn
from spt_fast.model.parameters import table
from spt_fast.model.stored import picked
from spt_fast.train.origin import Origin, carrier_of, origin_of, tokenizer_file
from spt_fast.train.state import KnownText, PhaseResult
from spt_fast.train.weights import digest_of, locate, stored_weights
from spt_fast.train.world import ALONE, World, pick_device

VOCABULARY_MULTIPLE = 64
"""Rows of the embedding are rounded up to a multiple of this, for matrix units."""

NOTABLE_NGRAM_SHARE = 0.1
"""Boilerplate makes some long n-grams common to any two texts of a kind; a larger share is probably a leak."""


@dataclass(frozen=True)
class PhasePlan:
    """One phase in whole steps."""

    index: int
    phase: Phase
    mixture: Mixture
    steps: int
    context: int
    """Tokens of a window."""
    rings: Mapping[str, Ring]
    """Every source, cut into such windows."""

    @property
    def tokens_per_step(self) -> int:
        return self.phase.batch.sequences * self.context

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    def micro(self, world: int) -> int:
        """Windows in a forward pass of each of `world` processes: all of its share unless the recipe says otherwise."""
        return self.phase.batch.micro or self.phase.batch.sequences // world

    def micro_batches(self, world: int) -> int:
        """Forward passes of each of `world` processes in a step."""
        return self.phase.batch.sequences // world // self.micro(world)

    def windows(self, steps: int) -> dict[str, int]:
        """Windows of each source that the phase's first `steps` steps read."""
        return self.mixture.counts(steps * self.phase.batch.sequences)


@dataclass(frozen=True)
class SourceFigures:
    """What a phase asks of one source, and what whole steps of whole windows give."""

    share: str
    tokens: int
    epochs_asked: float
    epochs: float


@dataclass(frozen=True)
class PhaseFigures:
    """What a phase asks and reads. Each of its `arms` makes all its steps."""

    name: str
    context: int
    """Tokens of a window."""
    steps: int
    tokens_asked: int
    tokens: int
    arms: int
    sources: dict[str, SourceFigures]


@dataclass(frozen=True)
class Plan:
    """Everything that the recipe names, opened and checked."""

    recipe: Recipe
    model: GPTConfig
    tokenizer: BaseTokenizer | None
    init_digest: str | None
    """The tensors that `init` names."""
    train: dict[str, TokenDataset]
    heldout: dict[str, TokenDataset]
    phases: tuple[PhasePlan, ...]

    def loader(
        self,
        index: int,
        start_counts: Mapping[str, int],
        world: World,
        *,
        first_step: int = 0,
        last_step: int | None = None,
    ) -> Loader:
        """This process's batches of phase `index`, steps [first_step, last_step).

        start_counts: how many windows of each source, of this phase's length, were read before the phase.
        """
        plan = self.phases[index]
        sequences = plan.phase.batch.sequences
        return Loader(
            SampleOrder(plan.mixture, plan.rings, sequences, start_counts, self.recipe.seed, index),
            self.train,
            plan.context,
            micro=plan.micro(world.size),
            vocab_size=self.model.vocab_size,
            first_step=first_step,
            last_step=plan.steps if last_step is None else last_step,
            rank=world.rank,
            world=world.size,
            documents=plan.phase.documents,
            device=world.device,
        )

    def read_before(self, index: int, finished: Mapping[str, PhaseResult]) -> dict[str, int]:
        """The `start_counts` of phase `index`, from what the earlier phases have read."""
        counts = dict.fromkeys(self.train, 0)
        for before in self.phases[:index]:
            if before.context == self.phases[index].context:
                counts |= {source: end for source, (_, end) in finished[before.phase.name].windows.items()}
        return counts

    def flops_per_token(self, index: int) -> int:
        """FLOPs to train on a token in phase `index`."""
        return train_flops_per_token(self.model, self.phases[index].context)

    def figures(self, finished: Mapping[str, PhaseResult]) -> dict[str, dict[str, Any]]:
        """The summary of the finished phases, as in summary.json."""
        return {
            name: {**result.as_json(), "context": plan.context, "flops_per_token": self.flops_per_token(plan.index)}
            for plan, (name, result) in zip(self.phases, finished.items(), strict=False)
        }

    @property
    def texts(self) -> dict[str, TokenDataset]:
        """Every dataset, by recipe field."""
        return _by_field(self.train, self.heldout)

    def digests(self) -> dict[str, str]:
        """Digests of the content of every dataset, the tokenizer and the starting weights, by recipe field."""
        others = {"tokenizer": self.tokenizer_digest, "init": self.init_digest}
        return {field: data.digest for field, data in self.texts.items()} | {
            field: digest for field, digest in others.items() if digest
        }

    @property
    def has_long_heldout(self) -> bool:
        """Whether held-out halves consist of windows of documents."""
        return any(map(has_long_documents, self.heldout.values()))

    def known_texts(self) -> dict[str, KnownText]:
        return {field: KnownText(data.num_tokens, data.modified_ns) for field, data in self.texts.items()}

    @property
    def tokenizer_digest(self) -> str | None:
        """The digest of the recipe's tokenizer, else of the one that the datasets record; None if there is none."""
        if self.tokenizer:
            return self.tokenizer.digest
        return next((data.tokenizer_digest for data in self.train.values() if data.tokenizer_digest), None)

    def origin(self, index: int, dtype: str) -> Origin:
        """The origin of the weights at the end of phase `index`; dtype: the compute dtype."""
        plan = self.phases[index]
        data = next((data for data in self.texts.values() if data.eos_id is not None), None)
        eos_id, bos_id = (data.eos_id, data.bos_id) if data else (None, None)
        return Origin(
            self.tokenizer_digest, plan.phase.documents, dtype, context=plan.context, eos_id=eos_id, bos_id=bos_id
        )

    def check_same_data(self, recorded: Mapping[str, str], where: Path) -> None:
        """DataError for a dataset, tokenizer or starting weights that differ from `recorded`, the `digests` kept at
        `where`."""
        for field, digest in self.digests().items():
            if recorded.get(field, digest) != digest:
                raise not_the_same(field, where)

    def check_alike(self, world: World) -> None:
        """RecipeError or DataError in every process whose recipe or data differ from those of the first one, since each
        host may have its own copies; their paths may differ. Collective."""
        own = {key: value for key, value in flat(self.recipe.plain()).items() if not _OF_A_HOST.fullmatch(key)}
        mine = self.digests()
        recipe, digests = world.exchange((own, mine))[0]
        for key in sorted(own.keys() | recipe.keys()):
            if own.get(key) != recipe.get(key):
                raise RecipeError(
                    f"{key}: is {shown(own.get(key))} on {socket.gethostname()}, but {shown(recipe.get(key))} in the "
                    "first process; start all processes with one recipe"
                )
        for field, digest in mine.items():
            if digests.get(field) != digest:
                raise DataError(
                    f"{field}: on {socket.gethostname()} it is not what the first process has; copy it there again"
                )

    def unrecorded(self, recorded: Mapping[str, str]) -> list[str]:
        """Warnings about content whose digest a checkpoint of an earlier version does not record."""
        known = {*recorded} | {"tokenizer" for text in self.texts.values() if text.tokenizer_digest}
        return [
            f"{field}: the checkpoint is of an earlier version and doesn't record it; it is assumed to be the same"
            for field in self.digests()
            if field not in known and not field.startswith("sources.")
        ]

    def check_files(self, before: Mapping[str, KnownText] | None, *, verify: bool) -> list[str]:
        """Compare every dataset with its hashes: some blocks of it, or all with `verify`.

        before: the datasets as they were at the checkpoint that is resumed. Returns warnings: files that may have been
        written since then and were not compared completely. DataError for a dataset that is damaged.
        """
        warnings = []
        for field, data in self.texts.items():
            with naming(field):
                whole = data.verify(None if verify else SAMPLED_BLOCKS)
            if whole or before is None or (field in before and before[field].modified_ns == data.modified_ns):
                continue
            remedy = "`verify=True` compares all of it" if data.has_hashes else f"{data.format} files record no hashes"
            warnings.append(f"{field}: only parts of {data.path} were compared with what was trained on; {remedy}")
        return warnings

    def starting_model(self) -> GPT:
        """The model with all of its `starting_weights`, on the CPU."""
        return self._set_up(GPT.with_weights(self.model, dict(self.starting_weights())))

    def model_without_weights(self) -> GPT:
        """The model on the meta device; an engine gives it weights."""
        return self._set_up(GPT.without_weights(self.model))

    def _set_up(self, model: GPT) -> GPT:
        model.checkpointing = self.recipe.engine.checkpointing
        model.fp8 = self.recipe.engine.fp8
        return model

    def starting_weights(self, world: World = ALONE) -> Mapping[str, Tensor]:
        """This process's part of fresh weights from the recipe's seed, or of those that `init` names, read when they
        are needed, or only the embedding of these; fp32 on the CPU."""
        mine = world.share({name: name for name in table(self.model)})
        theirs = stored_weights(Path(self.recipe.init))[1] if self.recipe.init else {}
        if theirs and self.recipe.init_only is None:
            return picked(theirs, mine)
        fresh = {name: values for name, values in drawn(self.model, self.recipe.seed) if name in mine}
        return {**fresh, **picked(theirs, {"embedding": "embedding"})} if theirs and "embedding" in mine else fresh

    def describe(self) -> list[PhaseFigures]:
        """Per phase: tokens and, per source, the share asked and the exact tokens and epochs."""
        return [self._figures(plan) for plan in self.phases]

    def _figures(self, plan: PhasePlan) -> PhaseFigures:
        phase, shares = plan.phase, plan.mixture.weights
        sources = {
            source: SourceFigures(
                share=str(shares[source]),
                tokens=windows * plan.context,
                epochs_asked=float(shares[source] * phase.tokens / self.train[source].num_tokens),
                epochs=float(plan.rings[source].epochs(windows)),
            )
            for source, windows in plan.windows(plan.steps).items()
        }
        return PhaseFigures(phase.name, plan.context, plan.steps, phase.tokens, plan.tokens, len(phase.arms()), sources)

    def leaks(self) -> list[str]:
        """Warnings: held-out text that is also in the training set of the same or another source."""
        found = []
        for heldout_of, heldout in self.heldout.items():
            for source, train in self.train.items():
                share = _overlap(heldout, train)
                documents, ngrams = share.documents, share.ngrams or 0.0
                if documents or ngrams > NOTABLE_NGRAM_SHARE:
                    what = f"{ngrams:.1%} of the long n-grams of the held-out text of {heldout_of!r}"
                    if documents is not None:
                        what = f"{documents:.1%} of the held-out documents of {heldout_of!r} and {ngrams:.1%} of their "
                        what += "long n-grams"
                    there, remedy = f"the training text of {source!r}", ""
                    if share.searched < 1:
                        there = f"the {share.searched:.2%} of {there} that were searched"
                        remedy = f"; `spt-fast inspect {heldout.path} --overlap {train.path}` searches all"
                    found.append(f"{what} are also in {there}: the loss will look better than it is{remedy}")
        return found


def _by_field(train: Mapping[str, TokenDataset], heldout: Mapping[str, TokenDataset]) -> dict[str, TokenDataset]:
    kinds = {"train": train, "heldout": heldout}
    return {f"sources.{name}.{kind}": data for kind, texts in kinds.items() for name, data in texts.items()}


def _overlap(heldout: TokenDataset, train: TokenDataset) -> Overlap:
    """Cached, since every run of a study may make a plan, and the text is read for it."""
    key = heldout.digest, train.digest
    if key not in _OVERLAPS:
        _OVERLAPS[key] = overlap_share(heldout, train)
    return _OVERLAPS[key]


_OVERLAPS: dict[tuple[str, str], Overlap] = {}

Kind = Literal["train", "heldout"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The kinds of a source's texts."""


def open_source(source: Source, kind: Kind, directory: str | Path = "") -> TokenDataset:
    """A text of a source, limited as its recipe says; a relative path starts at `directory`. It must name one."""
    named = source.train if kind == "train" else source.heldout
    assert named is not None
    places = Path(directory, named) if isinstance(named, str) else [Path(directory, path) for path in named]
    data = TokenDataset.open(places, source.dtype)
    return data.limit(source.limit_tokens) if kind == "train" and source.limit_tokens else data


_OF_A_HOST = re.compile(r"run|init|tokenizer|precision_file|engine\.config|sources\..+\.(train|heldout)", re.DOTALL)
"""The fields of a recipe whose paths may lead elsewhere on each host."""


def not_the_same(field: str, where: Path) -> DataError:
    """The content that a recipe's field names has changed since `where` was written."""
    what = {"init": "weights", "tokenizer": "tokens"}.get(field, "text")
    return DataError(
        f"{field}: holds other {what} than when {where} was written; put the old {what} back, or start a run of "
        "another name"
    )


def recorded_texts(
    recipe: Recipe, recorded: Mapping[str, str], where: Path, directory: str = ""
) -> dict[str, TokenDataset]:
    """By source, the training text that the recipe's paths still lead to, from `directory` or from here.

    recorded: the digests kept at `where`. DataError if only other text is found, held-out text included.
    """
    found = {}
    for name, source in recipe.sources.items():
        for kind in KINDS if source.heldout else KINDS[:1]:
            field, there = f"sources.{name}.{kind}", list[TokenDataset]()
            for start in dict.fromkeys((directory, "")):
                with suppress(DataError):
                    there.append(open_source(source, kind, start))
            same = [data for data in there if data.digest == recorded.get(field, data.digest)]
            if there and not same:
                raise not_the_same(field, where)
            if same and kind == "train":
                found[name] = same[0]
    return found


def make_plan(recipe: Recipe, *, world: int = 1, tokenizer: BaseTokenizer | None = None) -> Plan:
    """Open what the recipe names and check that every phase can be trained as written.

    tokenizer: the recipe's, if it is loaded already.

    Raises RecipeError or DataError, which names the field or file: a dataset that doesn't open or was made with another
    tokenizer, an id beyond the vocabulary, a corpus shorter than a window, a source whose share gives it no sample,
    a batch that doesn't divide among `world` processes, or an engine that can't be that many.
    """
    _check_engine(recipe, world)
    if recipe.tokenizer and tokenizer is None:
        tokenizer = Tokenizer.load(recipe.tokenizer)
    with naming("init"):
        init_digest = digest_of(Path(recipe.init)) if recipe.init else None
    train, heldout = {}, {}
    for name, source in recipe.sources.items():
        with naming(f"sources.{name}.train"):
            train[name] = open_source(source, "train")
        if source.heldout:
            with naming(f"sources.{name}.heldout"):
                heldout[name] = open_source(source, "heldout")
    texts = _by_field(train, heldout)
    if recipe.init:
        tokenizer = _that_of_the_weights(recipe, texts, tokenizer)
    _check_tokenizers(texts, tokenizer)
    if tokenizer and (made := [data for data in texts.values() if data.tokenizer_digest == tokenizer.digest]):
        tokenizer.eos_id, tokenizer.bos_id = made[0].eos_id, made[0].bos_id
    model = _model_config(recipe, tokenizer, texts)
    if recipe.init:  # else the context was known at reading
        check_lengths(recipe, model.context)
    for where, data in texts.items():
        if data.max_id is not None and data.max_id >= model.vocab_size:
            raise unknown_id(recipe, where, data, data.max_id, model)

    phases = []
    for index, phase in enumerate(recipe.phases):
        where = f"phases[{phase.name}]"
        _check_batch(phase, where, world)
        context, steps = phase.window(model.context), phase.steps(model.context)
        with naming(f"{where}.batch.context"):
            rings = {name: Ring(data.num_tokens, context, recipe.seed, name) for name, data in train.items()}
        mixture = Mixture(phase.mixture)
        try:
            check_every_source_is_drawn(mixture, steps * phase.batch.sequences)
        except RecipeError as error:
            raise RecipeError(f"{where}.mixture: {error}") from None
        untied = not model.tied or any(earlier.untie for earlier in recipe.phases[: index + 1])
        _check_phase(phase, where, texts, untied=untied, heldout=bool(heldout), tokenizer=tokenizer)
        phases.append(PhasePlan(index, phase, mixture, steps, context, rings))
    return Plan(recipe, model, tokenizer, init_digest, train, heldout, tuple(phases))


def _check_engine(recipe: Recipe, world: int) -> None:
    if recipe.engine.name == "local" and world > 1:
        raise RecipeError(f"engine.name: local is one process and can't be {world}; write deepspeed, or plan for one")
    if recipe.engine.cuda_graphs is True and pick_device().type != "cuda":
        raise RecipeError("engine.cuda_graphs: there is no GPU here; write auto")
    if recipe.engine.fp8 and (problem := fp8.obstacle(pick_device())):
        raise RecipeError(f"engine.fp8: {problem}; set it to false, or take a newer GPU")


def _check_batch(phase: Phase, where: str, world: int) -> None:
    sequences, micro = phase.batch.sequences, phase.batch.micro or 1
    if sequences % (micro * world):
        raise RecipeError(
            f"{where}.batch.sequences: {sequences} does not divide among {counted(world, 'process')} with "
            f"micro-batches of {micro}; choose a multiple of {micro * world}"
        )


def _check_phase(
    phase: Phase,
    where: str,
    texts: Mapping[str, TokenDataset],
    *,
    untied: bool,
    heldout: bool,
    tokenizer: BaseTokenizer | None,
) -> None:
    """Raises RecipeError or DataError if the phase needs what the model or the datasets don't have."""
    if phase.freeze == "embeddings" and not untied:
        raise RecipeError(
            f"{where}.freeze: the embedding is also the head, which would be frozen too; give the head its "
            f"own copy with {where}.untie: true"
        )
    if phase.evaluation.samples and not (tokenizer and heldout):
        missing = "a tokenizer to decode text with; name the data's in `tokenizer`" if heldout else "held-out text"
        raise RecipeError(f"{where}.eval.samples: needs {missing}, or write 0")
    for field, data in texts.items() if phase.documents else ():
        if data.document_ends is None:
            raise DataError(
                f"{field}: {data.path} records no documents, which {where}.documents needs; set it to false, "
                "or prepare the text with `spt-fast prepare`"
            )


def unknown_id(recipe: Recipe, where: str, data: TokenDataset, id_: int, model: GPTConfig) -> DataError:
    """Why a dataset cannot be read by the model, and the remedy."""
    remedy = "this run's tokenizer, or raise model.vocab_size"
    if recipe.init:
        remedy = f"the tokenizer of the weights at {recipe.init}, without tokens that they lack, or correct its dtype"
    says = f"{where}: {data.path} holds token id {id_}, outside the vocabulary of {model.vocab_size}"
    return DataError(f"{says}; prepare it with {remedy}")


def _that_of_the_weights(
    recipe: Recipe, texts: Mapping[str, TokenDataset], tokenizer: BaseTokenizer | None
) -> BaseTokenizer | None:
    """The recipe's tokenizer, else the one beside the weights that `init` names; RecipeError if these were trained with
    another one than the recipe's or a dataset's."""
    weights = locate(Path(str(recipe.init)))
    place = tokenizer_file(weights)
    with naming("init"):
        theirs = Tokenizer.load(place) if place else None
        known = origin_of(weights).tokenizer or (theirs and theirs.digest)
        if carrier := carrier_of(weights):
            hf.stop_ids(carrier)  # read again where texts are generated, after training
    given = [(f"the recipe's tokenizer {recipe.tokenizer}", tokenizer.digest)] if tokenizer else []
    given += [(where, data.tokenizer_digest) for where, data in texts.items() if data.tokenizer_digest]
    for by, digest in given:
        if known and digest != known:
            remedy = f"prepare the data with theirs (`tokenizer={place}`)" if place else "prepare the data with theirs"
            if by.startswith("the recipe's"):
                remedy = "leave `tokenizer` out of the recipe" if place else "name theirs"
            raise RecipeError(
                f"init: the weights at {recipe.init} were trained with another tokenizer ({known[:12]}) than {by} "
                f"({digest[:12]}); {remedy}, or start from other weights"
            )
    if theirs and place:
        check_alike(theirs, place.parent)
    return tokenizer or (theirs if theirs and theirs.digest == known else None)


def _check_tokenizers(texts: Mapping[str, TokenDataset], tokenizer: BaseTokenizer | None) -> None:
    expected, by = (tokenizer.digest, "the recipe's tokenizer") if tokenizer else (None, "")
    for where, data in texts.items():
        if data.tokenizer_digest is None:
            continue
        if expected is None:
            expected, by = data.tokenizer_digest, where
        elif data.tokenizer_digest != expected:
            raise DataError(
                f"{where}: {data.path} was made with another tokenizer ({data.tokenizer_digest[:12]}) than {by} "
                f"({expected[:12]}); prepare it again with this run's tokenizer"
            )
    known = [(where, data) for where, data in texts.items() if data.eos_id is not None]
    for where, data in known[1:]:
        for name in ("eos_id", "bos_id"):
            if (this := getattr(data, name)) != (first := getattr(known[0][1], name)):
                raise DataError(
                    f"{where}: {data.path} has {name} {this}, {known[0][0]} has {first}; prepare both with the same "
                    "tokens that begin and end a document"
                )


def _model_config(recipe: Recipe, tokenizer: BaseTokenizer | None, texts: Mapping[str, TokenDataset]) -> GPTConfig:
    given = {k: v for k, v in dataclasses.asdict(recipe.model).items() if v is not None}
    if recipe.init:
        with naming("init"):
            config, _ = stored_weights(Path(recipe.init))
        stated = dataclasses.asdict(config)
        if "preset" in given:
            expected = f"the weights at {recipe.init} set the shape; leave it out"
            raise RecipeError(invalid("model.preset", given["preset"], expected))
        for key, value in given.items():
            if stated[key] != value:
                expected = f"the weights at {recipe.init} have {stated[key]!r}; leave it out"
                if key == "context" and value < config.context:
                    expected += f", and train in shorter windows by a phase's `batch.context: {value}`"
                raise RecipeError(invalid(f"model.{key}", value, expected))
        return config

    if "vocab_size" not in given:
        sizes = [tokenizer.vocab_size] if tokenizer else [data.vocab_size for data in texts.values() if data.vocab_size]
        if not sizes:
            raise RecipeError(
                "model.vocab_size: missing; no dataset records one, so name the tokenizer or the vocabulary size"
            )
        given["vocab_size"] = -(-max(sizes) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if "preset" in given:
        return GPTConfig.preset(given.pop("preset"), **given)
    missing = [key for key in ("layers", "width", "heads", "context") if key not in given]
    if missing:
        raise RecipeError(f"model.{missing[0]}: missing; give it, or name a preset such as 10m")
    given.setdefault("kv_heads", given["heads"])
    given.setdefault("ffn", -(-given["width"] * 8 // 3 // 64) * 64)
    return GPTConfig(**given)
