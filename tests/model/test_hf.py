from __future__ import annotations

import importlib
import inspect
import json
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spt_fast.errors import CheckpointError
from spt_fast.model import flops, hf, hf_config, stored
from spt_fast.model.config import LinearScaling, RopeScaling, YarnScaling
from spt_fast.model.families import FAMILIES, family_of
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.model.parameters import table

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()


LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=15)


YARN = YarnScaling(factor=4.0, original_max_position_embeddings=15, beta_fast=2.0, beta_slow=0.25)
SCALINGS = [
    None,
    LLAMA3,
    LinearScaling(factor=3.0),
    YARN,
    replace(YARN, attention_factor=0.7),
    replace(YARN, mscale=0.7, mscale_all_dim=1.3),
    replace(YARN, truncate=False, beta_fast=32.0),
]


def draw_config(rng: random.Random, family: str) -> GPTConfig:
    """A shape of the family, in which all that the family may have is drawn."""
    layers, kv_heads = rng.randint(1, 3), rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 3])
    head_dim = rng.choice([4, 8, 14, 16])
    # transformers has Llamas with a head_dim of their own, but only where heads divide the width.
    widths = [24 * heads, 8 * heads] if family == "llama" else [24, 40, 56]
    some_layers = [layer for layer in range(layers) if rng.random() < 0.5]
    scaling, window = rng.choice(SCALINGS), rng.choice([None, 1, 2, 5, 100])
    if family == "olmo3":
        window = window or 3
        scaling = replace(scaling, truncate=True) if isinstance(scaling, YarnScaling) else scaling
    free = {
        "window": window,
        "full_layers": some_layers if window else [],
        "no_rope_layers": some_layers,
        "scaled_windows": scaling is None or rng.random() < 0.5,
    }
    of_file = {name: rng.random() < 0.5 for name in FAMILIES[family].written.values()}
    return canonical(
        GPTConfig(
            layers=layers,
            width=rng.choice([*widths, heads * head_dim]),
            heads=heads,
            kv_heads=kv_heads,
            ffn=rng.choice([32, 52, 100]),
            context=rng.choice([16, 32, 64]),
            vocab_size=rng.randint(20, 300),
            head_dim=head_dim,
            tied=rng.random() < 0.5,
            rope_theta=rng.choice([100.0, 10_000.0, 500_000.0, 1e6]),
            norm_eps=rng.choice([1e-5, 1e-6]),
            **{"rope_scaling": scaling, **FAMILIES[family].fixed},
            **{ours: of_file[theirs] for ours, theirs in FAMILIES[family].written.items()},
            **{name: value for name, value in free.items() if name in FAMILIES[family].free},
            family=family,
        )
    )


def canonical(config: GPTConfig) -> GPTConfig:
    """With the family only where the shape alone would be of another one."""
    unnamed = replace(config, family=None)
    return unnamed if family_of(unnamed) == config.family else config


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights under which every parameter matters to the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)


def assert_same_logits(ours: GPT, theirs: torch.nn.Module, seed: int, *, gradients: bool = False) -> None:
    config = ours.config
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (2, config.context), generator=generator)
    with torch.set_grad_enabled(gradients):
        a, b = ours(tokens), theirs.eval()(tokens).logits
    assert a.dtype == b.dtype == torch.float32
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    if gradients:
        upstream = torch.randn(a.shape, generator=generator)
        a.backward(upstream)
        b.backward(upstream)
        expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
        rounding = 1e-6 * max(
            float(gradient.abs().max()) for gradient in expected.values()
        )  # where a softmax has one key
        for name, parameter in ours.named_parameters():
            whole = torch.cat([expected[source] for source in table(config)[name].sources])
            assert (parameter.grad - whole).abs().max() <= 1e-4 * whole.abs().max() + rounding, name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved Llama."""
    config = GPTConfig(layers=2, width=32, heads=4, kv_heads=2, ffn=48, context=16, vocab_size=50)
    GPT(config).save_hf(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "drop"}))


# ------------------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_our_folder_loads_in_transformers_and_back(seed: int, family: str, tmp_path: Path) -> None:
    config = draw_config(random.Random(seed), family)
    print(config)
    ours = GPT(config)
    randomise(ours, seed)
    ours.save_hf(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (theirs.config.model_type, [type(theirs).__name__]) == (family, theirs.config.architectures)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    assert_same_logits(ours, theirs, seed, gradients=True)

    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        back = GPT.from_hf(folder)
        assert back.config == config
        for (name, a), b in zip(ours.named_parameters(), back.parameters(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("seed", range(10, 14))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_loads_with_the_same_logits(seed: int, family: str, tmp_path: Path) -> None:
    """From a configuration that transformers itself writes, in shards."""
    config = draw_config(random.Random(seed), family)
    print(config)
    scaled = {**asdict(config.rope_scaling)} if config.rope_scaling else {"rope_type": "default"}
    rope, plain = scaled | {"rope_theta": config.rope_theta}, {"rope_type": "default", "rope_theta": config.rope_theta}
    windowed = [config.window_of(layer) is not None for layer in range(config.layers)]
    more = {
        "attention_bias": config.qkv_bias,
        "attention_out_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": config.window,
        "use_sliding_window": config.window is not None,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windowed],
        "no_rope_layers": [int(layer not in config.no_rope_layers) for layer in range(config.layers)],
    }
    by_type = {"full_attention": rope, "sliding_attention": rope if config.scaled_windows else plain}
    configure = transformers.AutoConfig.for_model(family).__class__
    has = {name: value for name, value in more.items() if name in inspect.signature(configure).parameters}
    theirs = transformers.AutoModelForCausalLM.from_config(
        configure(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            rope_parameters=by_type if family == "olmo3" else rope,
            tie_word_embeddings=config.tied,
            pad_token_id=None,
            **has,
        )
    )
    randomise(theirs, seed)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / hf.INDEX).exists() or config.vocab_size * config.width < 5000
    ours = GPT.from_hf(tmp_path)
    assert ours.config == config
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert_same_logits(ours, theirs, seed, gradients=True)


def test_config_is_what_transformers_4_reads(folder: Path) -> None:
    """Version 4 looks for rope_theta and torch_dtype at the top level, version 5 for rope_parameters and dtype."""
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["torch_dtype"] == config["dtype"] == "float32"
    change_config(folder, rope_parameters="drop", dtype="drop", rope_theta=777.0)
    assert GPT.from_hf(folder).config.rope_theta == 777.0
    change_config(folder, rope_theta="drop")
    assert GPT.from_hf(folder).config.rope_theta == 10_000.0


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling", "both"])
def test_llama3_scaling_under_the_names_of_both_versions(tmp_path: Path, name: str) -> None:
    """Kept, divided and in-between frequencies all matter here, and so does where the window was once."""
    plain = GPTConfig(layers=2, width=32, heads=2, kv_heads=1, ffn=48, context=64, vocab_size=50, rope_theta=100.0)
    ours = GPT(replace(plain, rope_scaling=LLAMA3))
    randomise(ours, 1)
    ours.save_hf(tmp_path)
    if name == "rope_parameters":
        change_config(tmp_path, rope_scaling="drop", rope_theta="drop")
    elif name == "rope_scaling":
        change_config(tmp_path, rope_parameters="drop")
    back, theirs = GPT.from_hf(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.config == ours.config
    assert_same_logits(back, theirs, 1)
    unscaled = GPT(plain)
    unscaled.load_state_dict(ours.state_dict())
    with pytest.raises(AssertionError):
        assert_same_logits(unscaled, theirs, 1)


def test_the_window_before_scaling_is_found_where_transformers_finds_it(folder: Path) -> None:
    scaling = {"type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4}
    change_config(folder, rope_parameters="drop", rope_scaling=scaling)
    expected = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    assert GPT.from_hf(folder).config.rope_scaling == expected
    change_config(folder, original_max_position_embeddings=9)
    assert GPT.from_hf(folder).config.rope_scaling == replace(expected, original_max_position_embeddings=9)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "llama3", **asdict(LLAMA3)}], ids=["plain", "scaled"])
def test_a_rope_theta_that_transformers_reads_for_some_layers_of_olmo_3_is_refused(
    tmp_path: Path, scaling: dict[str, object] | None
) -> None:
    """Its version 5 gives layers with a window the family's own, unless rope_parameters says otherwise."""
    sizes: dict[str, Any] = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "context": 64}
    olmo: dict[str, Any] = {
        "norms": "after",
        "qk_norm": True,
        "qk_norm_over": "width",
        "window": 4,
        "full_layers": (3,),
    }
    ours = GPT(GPTConfig(**sizes, **olmo, vocab_size=50, family="olmo3", rope_theta=500_000.0))
    randomise(ours, 1)
    ours.save_hf(tmp_path)
    old: dict[str, object] = {"rope_parameters": "drop", "rope_scaling": scaling}
    change_config(tmp_path, **old)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(GPT.from_hf(tmp_path), theirs, 1)
    change_config(tmp_path, **old, rope_theta=100.0)
    read = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert [read[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention")] == [100.0, 500_000.0]
    says = (
        r"config\.json: rope_theta: 100\.0 is invalid: .* 5 has 500,000 in layers with a window; write it in rope_par"
    )
    with pytest.raises(CheckpointError, match=says):
        GPT.from_hf(tmp_path)
    rope = {"rope_type": "default", "rope_theta": 100.0}
    both = {"full_attention": {**rope, **(scaling or {})}, "sliding_attention": rope}
    change_config(tmp_path, **old | {"rope_parameters": both, "rope_scaling": "drop"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(GPT.from_hf(tmp_path), theirs, 1)


def test_a_llama_that_transformers_refuses_is_ours_alone(tmp_path: Path) -> None:
    model = GPT(GPTConfig(layers=1, width=20, heads=3, kv_heads=1, ffn=8, context=4, vocab_size=9, head_dim=6))
    with pytest.warns(UserWarning, match="3 heads don't divide its width 20"):
        model.save_hf(tmp_path)
    assert GPT.from_hf(tmp_path).config == model.config


def test_an_untied_model_stays_untied(tmp_path: Path, folder: Path) -> None:
    model = GPT.from_hf(folder)
    model.untie()
    assert model.head is not None
    randomise(model, 1)
    model.save_hf(tmp_path / "untied")
    back = GPT.from_hf(tmp_path / "untied")
    assert back.head is not None
    assert torch.equal(back.head, model.head)
    assert_same_logits(back, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "untied"), 1)


def test_that_transformers_imports_kernels_leaves_our_ops_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout that name is our folder; to define an op again takes the first one's code away."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    importlib.import_module("kernels")
    assert not [name for name in sys.modules if name.startswith("kernels.")]


# --------------------------------------------------------------------------------------------------------- precision


def test_files_are_read_and_written_in_pieces_as_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what safetensors write, so that folders of earlier versions have the digests that they had."""
    whole, before = hf.load(folder)[1], (folder / hf.WEIGHTS).read_bytes()
    save_file(dict(sorted(load_file(folder / hf.WEIGHTS).items())), folder / hf.WEIGHTS, metadata={"format": "pt"})
    assert (folder / hf.WEIGHTS).read_bytes() == before
    monkeypatch.setattr(stored, "PIECE", 1000)
    pieces = hf.stored_weights(folder, torch.bfloat16)[1]
    assert all(torch.equal(pieces[name], tensor.bfloat16()) for name, tensor in whole.items())
    GPT.from_hf(folder).save_hf(folder)
    assert (folder / hf.WEIGHTS).read_bytes() == before
    assert hf.load(folder, torch.float16)[1]["embedding"].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(tmp_path: Path, folder: Path, dtype: torch.dtype) -> None:
    model = GPT.from_hf(folder)
    model.save_hf(tmp_path / "low", dtype=dtype)
    assert model.embedding.dtype == torch.float32
    assert all(tensor.dtype == dtype for tensor in load_file(tmp_path / "low" / hf.WEIGHTS).values())
    low = GPT.from_hf(tmp_path / "low")
    assert torch.equal(low.embedding, model.embedding.to(dtype))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low", dtype="auto").dtype == dtype
    low.save_hf(tmp_path / "kept")
    assert GPT.from_hf(tmp_path / "kept").embedding.dtype == dtype


def test_mixed_dtypes_load_as_float32(folder: Path) -> None:
    tensors = load_file(folder / hf.WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, folder / hf.WEIGHTS)
    assert {parameter.dtype for parameter in GPT.from_hf(folder).parameters()} == {torch.float32}


def test_unsavable_dtype_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="float64"):
        GPT.from_hf(folder).save_hf(tmp_path / "wide", dtype=torch.float64)
    assert not (tmp_path / "wide").exists()


# --------------------------------------------------------------------------------------------------------- tokenizer


class FakeTokenizer:
    eos_id = 7
    bos_id = None

    def save_hf(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def test_the_tokenizer_is_saved_too(tmp_path: Path, folder: Path) -> None:
    GPT.from_hf(folder).save_hf(tmp_path / "with", FakeTokenizer())
    assert (tmp_path / "with" / "tokenizer.json").exists()
    config = json.loads((tmp_path / "with" / "config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == 7
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] is None


def test_files_beside_the_weights_are_copied_with_them(tmp_path: Path, folder: Path) -> None:
    (folder / "generation_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    change_config(folder, eos_token_id=[3, 4], pad_token_id=0)
    hf.save(*hf.load(folder), tmp_path / "there", like=folder)
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == ([3, 4], 0, None)


# ------------------------------------------------------------------------------------------------------------ safety


def test_saving_replaces_a_model_and_leaves_other_files(tmp_path: Path, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    other = GPT(GPTConfig(layers=1, width=32, heads=2, kv_heads=1, ffn=48, context=16, vocab_size=20, tied=False))
    other.save_hf(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert GPT.from_hf(folder).config == other.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "a temporary folder was left"


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, folder: Path) -> None:
    class FailingTokenizer(FakeTokenizer):
        def save_hf(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"could not be written.*No space"):
        GPT(GPTConfig.preset("1m")).save_hf(folder, FailingTokenizer())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_pickles_are_refused_with_the_remedy(folder: Path) -> None:
    (folder / hf.WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*never read.*save_pretrained"):
        GPT.from_hf(folder)


def test_missing_and_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: does not exist; give a Hugging Face"):
        GPT.from_hf(tmp_path / "nowhere")
    whole = (folder / hf.WEIGHTS).read_bytes()
    (folder / hf.WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        GPT.from_hf(folder)
    (folder / hf.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        GPT.from_hf(folder)
    (folder / hf.INDEX).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: cannot be read"):
        GPT.from_hf(folder)
    (folder / hf.INDEX).write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        GPT.from_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        GPT.from_hf(folder)


def test_what_a_download_left_in_the_place_of_files_is_named(folder: Path) -> None:
    weights, config = folder / hf.WEIGHTS, folder / "config.json"
    whole = {file: file.read_bytes() for file in (weights, config)}
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2471645608\n"
    refusals = (
        b"Access to model meta-llama/Llama-3.2-1B is restricted. You must have access to it and be authenticated.",
        b"Invalid username or password.",
        b"<!doctype html><html><body>Sign in</body></html>",
        b'{"error":"Repository not found"}',
    )
    for file in (weights, config):
        file.write_bytes(pointer)
        with pytest.raises(CheckpointError, match=rf"{file.name}: is a Git LFS pointer.*`git lfs pull`"):
            GPT.from_hf(folder)
        for refusal in refusals:
            file.write_bytes(refusal)
            with pytest.raises(
                CheckpointError, match=rf"{file.name}: holds a server's error message.*ask for access.*again"
            ):
                GPT.from_hf(folder)
        file.write_bytes(whole[file])
    weights.write_bytes(b"\xff\xfe\x00" * 9)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as safetensors"):
        GPT.from_hf(folder)


def test_missing_shards_other_formats_and_names_on_a_hub_say_what_to_do(folder: Path, tmp_path: Path) -> None:
    (folder / hf.WEIGHTS).rename(folder / "model-00002-of-00003.safetensors")
    (folder / hf.WEIGHTS).symlink_to("../blobs/4d7a")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a link to a missing file; download"):
        GPT.from_hf(folder)
    (folder / hf.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"has model-00002-of-00003\.safetensors without model\.saf.*index"):
        GPT.from_hf(folder)
    listed = {f"t{n}": f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)}
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00003\.safetensors: cannot.*3 shards, and 2 of them are"
    ):
        GPT.from_hf(folder)
    (folder / hf.INDEX).unlink()
    (folder / "model-00002-of-00003.safetensors").rename(folder / "model-Q4_K_M.gguf")
    with pytest.raises(CheckpointError, match=r"Q4_K_M\.gguf holds weights in another format; .* safetensors"):
        GPT.from_hf(folder)
    with pytest.raises(
        CheckpointError, match=r"does not exist; nothing is downloaded.*`hf download a-b/C-1\.5 --local-d"
    ):
        GPT.from_hf("a-b/C-1.5")
    (tmp_path / "models--a-b--C").mkdir()
    folder.rename(tmp_path / "models--a-b--C" / "snapshots")
    (tmp_path / "models--a-b--C" / "snapshots" / "1f0").mkdir()
    with pytest.raises(CheckpointError, match=r"no such file; give the folder .*models--a-b--C/snapshots/1f0"):
        GPT.from_hf(tmp_path / "models--a-b--C")
    (tmp_path / "models--a-b--C" / "snapshots" / "2e8").mkdir()
    (tmp_path / "models--a-b--C" / "refs").mkdir()
    (tmp_path / "models--a-b--C" / "refs" / "main").write_text("1f0")
    with pytest.raises(CheckpointError, match=r"give the folder .*snapshots/1f0"):
        GPT.from_hf(tmp_path / "models--a-b--C")


def test_missing_extra_and_misshapen_tensors_are_named(folder: Path) -> None:
    tensors = load_file(folder / hf.WEIGHTS)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, folder / hf.WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        GPT.from_hf(folder)
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, folder / hf.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"no place for tensor model\.layers\.0\.self_attn\.q_proj\.bias"):
        GPT.from_hf(folder)
    save_file({**tensors, name: torch.zeros(8, 32)}, folder / hf.WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{name} is \[8, 32\]; by config.json it should be \[16, 32\]"):
        GPT.from_hf(folder)
    save_file({**tensors, name: torch.zeros(16, 32, dtype=torch.int8)}, folder / hf.WEIGHTS)
    with pytest.raises(CheckpointError, match="int8"):
        GPT.from_hf(folder)


def test_a_separate_head_is_kept_whatever_the_configuration_says(tmp_path: Path) -> None:
    model = GPT(GPTConfig(layers=1, width=32, heads=2, kv_heads=1, ffn=48, context=16, vocab_size=50, tied=False))
    randomise(model, 1)
    model.save_hf(tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from model\.embed_tokens\.weight.*it is kept"):
        assert hf.read_config(tmp_path) == model.config  # the shape that a run with `init` plans by
    with pytest.warns(UserWarning, match="it is kept"):
        back = GPT.from_hf(tmp_path)
    assert back.head is not None
    assert torch.equal(back.head, model.head)
    tensors = load_file(tmp_path / hf.WEIGHTS)
    save_file(tensors | {hf.HEAD: tensors[hf.EMBEDDING].clone()}, tmp_path / hf.WEIGHTS)
    assert GPT.from_hf(tmp_path).head is None
    change_config(tmp_path, tie_word_embeddings=False)
    assert GPT.from_hf(tmp_path).head is not None


def test_stored_frequencies_are_those_of_the_configuration(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = {of: tensor.bfloat16() for of, tensor in load_file(folder / hf.WEIGHTS).items()}
    save_file(tensors | {name: 1 / 10_000 ** (torch.arange(0, 8, 2) / 8)}, folder / hf.WEIGHTS)
    assert hf.stored_weights(folder)[1].like["embedding"].dtype == torch.bfloat16, "that of the weights"
    change_config(folder, rope_theta=1e6, rope_parameters="drop")
    with pytest.raises(CheckpointError, match=rf"tensor {name} holds other frequencies"):
        GPT.from_hf(folder)


@pytest.mark.parametrize(
    "places",
    [
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_theta": 5e5, "type": "default"}},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": asdict(LLAMA3)},
        {"rope_parameters": asdict(LLAMA3), "rope_scaling": asdict(replace(LLAMA3, factor=4.0))},
    ],
    ids=str,
)
def test_rope_settings_that_contradict_each_other_are_refused(folder: Path, places: dict[str, object]) -> None:
    change_config(folder, **{"rope_theta": "drop", "rope_parameters": "drop", **places})
    with pytest.raises(CheckpointError, match=r"rope_\w+, rope_\w+ contradict each other"):
        GPT.from_hf(folder)


@pytest.mark.parametrize("fields", ["Llama", "Qwen2", "Qwen3", "SmolLM2", "TinyLlama"])
def test_fields_that_change_nothing_are_accepted_without_a_warning(
    folder: Path, fields: str, recwarn: pytest.WarningsRecorder
) -> None:
    """Every field that transformers writes for a family, and those of files on the hub."""
    hub = {
        "SmolLM2": {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
        "TinyLlama": {"pretraining_tp": 1, "_name_or_path": "x", "rope_scaling": None, "is_causal": True},
    }
    given = hub.get(fields) or getattr(transformers, f"{fields}Config")(num_hidden_layers=2).to_dict()
    ours = json.loads((folder / "config.json").read_text())
    change_config(folder, **{name: value for name, value in given.items() if name not in ours})
    change_config(folder, residual_multiplier=1.0, logits_scaling=1)
    GPT.from_hf(folder)
    assert [str(warning.message) for warning in recwarn] == []


def test_a_field_that_nothing_is_known_about_is_named(folder: Path) -> None:
    change_config(folder, unsloth_fixed=True, attn_pdrop=0.1, **{"x" * 1000: 1})
    with pytest.warns(
        UserWarning, match=r"config\.json: a GPT has no place for 'unsloth_fixed, attn_pdrop, x+…; ignored"
    ):
        assert GPT.from_hf(folder).config == GPT.from_hf(folder).config


def test_a_damaged_index_of_shards_is_named(folder: Path) -> None:
    tensors = load_file(folder / hf.WEIGHTS)
    (folder / hf.WEIGHTS).rename(folder / "a.safetensors")
    save_file({hf.EMBEDDING: tensors[hf.EMBEDDING]}, folder / "b.safetensors")
    for weight_map, said in [
        (dict.fromkeys(tensors, "a.safetensors") | {hf.EMBEDDING: "b.safetensors"}, "is in a.safetensors too; keep"),
        (dict.fromkeys([*tensors, "model.more"], "a.safetensors"), r"index\.json: tensor model\.more is in no shard"),
        ({hf.EMBEDDING: 5}, "shard 5 is not a file"),
        ({}, "names no shards"),
        ([], "names no shards"),
    ]:
        (folder / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=said):
            GPT.from_hf(folder)
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": {hf.EMBEDDING: "a.safetensors"}}))
    assert GPT.from_hf(folder).config.layers == 2  # what the shards hold counts


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}),
        ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "extrapolation_factor": 1.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("partial_rotary_factor", 0.25),
        ("rope_parameters", 5),
        ("rope_parameters", {"rope_type": "default", "factor": 8.0}),
        ("rope_scaling", {"type": "linear", "rope_type": "llama3", **{**asdict(LLAMA3), "rope_type": "llama3"}}),
        ("rope_interleaved", True),
        ("rotary_pct", 0.25),
        ("final_logit_softcapping", 30.0),
        ("attention_multiplier", 1.0),
        ("residual_multiplier", 0.22),
        ("logits_scaling", True),
        ("sliding_window", 4096),
        ("num_local_experts", 8),
        ("layer_types", 5),
        ("model_type", []),
        ("attention_out_bias", True),
        ("auto_map", {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}),
        ("hidden_act", "gelu"),
        ("is_causal", False),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("quantization_config", {"bits": 4}),
        ("model_type", "gpt2"),
        ("model_type", None),
        ("architectures", ["LlamaForSequenceClassification"]),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(folder: Path, field: str, value: object) -> None:
    change_config(folder, **{"rope_parameters": "drop", field: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} .*cannot be represented"):
        GPT.from_hf(folder)


@pytest.mark.parametrize(
    ("model_type", "fields", "said"),
    [
        (
            "gemma2",
            {},
            r"'gemma2' cannot be represented, since its norms multiply by 1 \+ weight.*known: llama",
        ),
        ("gpt_neox", {}, "model_type 'gpt_neox' cannot be represented, since its norms are LayerNorms"),
        ("gpt2", {}, "since its positions are learnt"),
        ("phi3", {"auto_map": {"AutoConfig": "mine.Config"}}, "auto_map .*'mine.Config'.* never run; remove auto_map"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "rope_scaling .*long",
        ),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: .*the family phi3 has no such"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor 0.75 cannot"),
        ("mistral", {"sliding_window": 0}, "sliding_window: 0 is invalid"),
        ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 2}, "layer_types .* cannot"),
        ("mistral", {"attention_bias": True}, "attention_bias True cannot"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "x"}, "max_window_layers: 'x' is invalid"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .* cannot"),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types .* cannot"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias True cannot"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers: .* a 1 or a 0 for each of 2 layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval: 0 is invalid"),
        ("olmo3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters .* cannot"),
        ("olmo3", {"sliding_window": None}, "sliding_window: None is invalid: the family olmo3"),
        (
            "olmo3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e6},
                }
            },
            "rope_parameters .* cannot",
        ),
        ("llama", {"attention_bias": True}, r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is missing"),
    ],
)
def test_what_a_family_does_not_have_is_refused_with_the_reason(
    folder: Path, model_type: str, fields: dict[str, object], said: str
) -> None:
    architecture = {"architectures": "drop", "rope_parameters": "drop", "rope_theta": "drop"}
    change_config(folder, **{"model_type": model_type, **architecture, **fields})
    with pytest.raises(CheckpointError, match=said):
        GPT.from_hf(folder)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "mistral"}, {"window": 4096, "family": None}),
        ({"model_type": "mistral", "sliding_window": None}, {"window": None, "family": "mistral"}),
        ({"model_type": "qwen2", "sliding_window": 9}, {"window": None}),
        ({"model_type": "qwen2", "use_sliding_window": None}, {"window": None}),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            {"window": 4096, "full_layers": (0,)},
        ),
        ({"model_type": "olmo3", "num_hidden_layers": 5}, {"full_layers": (3,), "rope_theta": 500_000.0}),
        (
            {"model_type": "olmo3", "rope_scaling": asdict(LLAMA3), "rope_theta": 5e5},
            {"rope_scaling": LLAMA3, "scaled_windows": False},
        ),
        ({"model_type": "smollm3", "num_hidden_layers": 4}, {"no_rope_layers": (3,), "window": None}),
        (
            {"model_type": "smollm3", "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 7},
            {"no_rope_layers": (0,), "full_layers": (1,), "window": 7},
        ),
        ({"model_type": "seed_oss", "head_dim": 8}, {"qkv_bias": True, "o_bias": False, "family": "seed_oss"}),
    ],
)
def test_what_a_file_leaves_out_is_as_transformers_has_it(
    folder: Path, fields: dict[str, object], expected: dict[str, object]
) -> None:
    drop = dict.fromkeys(["architectures", "rope_parameters", "rope_theta", "attention_bias"], "drop")
    change_config(folder, **drop | fields)
    found = hf_config.read_config(folder)
    assert {name: getattr(found, name) for name in expected} == expected


def shape_of(model_type: str, *sizes: int, **more: object) -> dict[str, object]:
    """What a config.json says of width, feed-forward width, layers, heads, key/value heads, vocabulary and context."""
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    names = [*names.split(), "max_position_embeddings"]
    return {"model_type": model_type, "hidden_act": "silu", **dict(zip(names, sizes, strict=True)), **more}


YARN_OF_OLMO_3 = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
QWEN = {"use_sliding_window": False, "tie_word_embeddings": False}
PUBLISHED = {
    "Mistral 7B v0.3": (shape_of("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, sliding_window=None), 7_248_023_552),
    "Mistral Nemo": (
        shape_of("mistral", 5120, 14336, 40, 32, 8, 131072, 131072, head_dim=128, sliding_window=None),
        12_247_782_400,
    ),
    "OLMo 2 7B": (shape_of("olmo2", 4096, 11008, 32, 32, 32, 100352, 4096, attention_bias=False), 7_298_617_344),
    "OLMo 3 7B": (
        shape_of(
            "olmo3", 4096, 11008, 32, 32, 32, 100278, 65536, rope_theta=500000, rope_scaling=YARN_OF_OLMO_3,
            layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 8,
        ),
        7_298_011_136,
    ),
    "SmolLM3 3B": (
        shape_of("smollm3", 2048, 11008, 36, 16, 4, 128256, 65536, no_rope_layers=[1, 1, 1, 0] * 9, mlp_bias=False),
        3_075_098_624,
    ),
    "Phi-4": (
        shape_of("phi3", 5120, 17920, 40, 40, 10, 100352, 16384, original_max_position_embeddings=16384),
        14_659_507_200,
    ),
    "Seed-OSS 36B": (
        shape_of("seed_oss", 5120, 27648, 64, 80, 8, 155136, 524288, head_dim=128, attention_bias=True),
        36_151_104_512,
    ),
    "Qwen2.5 7B": (
        shape_of("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072, sliding_window=131072, **QWEN),
        7_615_616_512,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_parameters_that_they_are_published_with(tmp_path: Path, name: str) -> None:
    """Padding of the vocabulary included, as with Qwen2.5's 152,064 rows for 151,665 ids."""
    described, count = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(described))
    config = hf_config.read_config(tmp_path)
    assert flops.parameters(config) == count
    (tmp_path / "config.json").write_text(json.dumps(hf_config.to_hf(config, "bfloat16", None)))
    assert hf_config.read_config(tmp_path) == config


def test_incomplete_and_wrong_configs_name_the_field(folder: Path) -> None:
    change_config(folder, hidden_size="drop")
    with pytest.raises(CheckpointError, match="hidden_size is missing"):
        GPT.from_hf(folder)
    change_config(folder, hidden_size=32, eos_token_id=[2, "x"])
    with pytest.raises(CheckpointError, match=r"eos_token_id: \[2, 'x'\] is invalid: a token id, or a list of some"):
        GPT.from_hf(folder)
    change_config(folder, hidden_size=-1, eos_token_id=[2, 3])
    with pytest.raises(CheckpointError, match=r"config\.json: hidden_size: -1 is invalid: write a whole"):
        GPT.from_hf(folder)
    (folder / "config.json").write_text('{"hidden_size": 32, "x": {"y": 1, "z": 2, "y": 3}}')
    with pytest.raises(CheckpointError, match=r"cannot be read as JSON \('y' is given twice\)"):
        GPT.from_hf(folder)


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_refused(folder: Path, alone: bool) -> None:
    (folder / "adapter_config.json").write_text("{}")
    if alone:
        (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: a GPT has no place for an adapter; merge it"):
        GPT.from_hf(folder)


def test_a_byte_order_mark_is_accepted(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    assert GPT.from_hf(folder).config.width == 32


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=16, context=4, vocab_size=9))

    def killed(folder: object, ignore_errors: bool = False) -> None:
        pass

    with monkeypatch.context() as patch:
        patch.setattr(hf, "write", lambda *args, **kwargs: 1 / 0)
        patch.setattr(hf.shutil, "rmtree", killed)
        with pytest.raises(ZeroDivisionError):
            model.save_hf(tmp_path / "weights")
    assert any(tmp_path.iterdir())
    monkeypatch.setattr("os.getpid", lambda: 1)  # the next process has another number
    model.save_hf(tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
