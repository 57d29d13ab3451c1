"""What other trainers call the fields of a recipe, so that a newcomer's name is answered with ours."""

from __future__ import annotations

from collections.abc import Iterable

from spt_fast.errors import nearest

SYNONYMS = {
    "run": "run_name output_dir out_dir save_dir experiment exp_name project_name",
    "seed": "random_seed manual_seed data_seed",
    "init": "init_from base_model pretrained model_name_or_path model_name from_pretrained load_from hf_model",
    "precision": "dtype bf16 fp16 mixed_precision amp torch_dtype",
    "tokenizer": "tokenizer_path tokenizer_name tokenizer_file encoding",
    "sources": "data datasets dataset corpora data_mix data_mixture",
    "phases": "stages training train_phases",
    "model.preset": "model_size size config_name",
    "model.layers": "num_layers n_layer n_layers num_hidden_layers depth",
    "model.width": "hidden_size n_embd d_model dim embed_dim embedding_dim hidden_dim model_dim",
    "model.heads": "num_heads n_head n_heads num_attention_heads",
    "model.kv_heads": "num_key_value_heads n_kv_heads num_kv_heads n_query_groups num_query_groups",
    "model.ffn": "intermediate_size d_ff ffn_dim mlp_hidden_size ffn_hidden_size hidden_ffn mlp_dim",
    "model.context": "seq_len seq_length sequence_length max_seq_len max_seq_length block_size n_ctx context_length "
    "max_sequence_length max_position_embeddings",
    "model.vocab_size": "n_vocab padded_vocab_size num_embeddings",
    "model.tied": "tie_word_embeddings tie_embeddings tied_embeddings tie_weights weight_tying",
    "model.rope_theta": "rope_base rotary_base rotary_emb_base",
    "model.window": "sliding_window attention_window",
    "model.qkv_bias": "attention_bias add_qkv_bias",
    "model.no_rope_layers": "nope_layers",
    "model.family": "model_type architecture architectures",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layernorm_eps layer_norm_epsilon",
    "sources.NAME.train": "path paths file prefix data_path train_data train_path",
    "sources.NAME.heldout": "val validation valid eval_data val_data test held_out",
    "sources.NAME.limit_tokens": "max_docs num_train_tokens token_limit",
    "phases[…].tokens": "max_steps num_steps total_tokens max_tokens train_tokens num_tokens steps train_steps "
    "max_iters num_iterations total_steps max_duration num_train_epochs epochs num_epochs",
    "phases[…].mixture": "mix weights proportions sampling_weights data_weights ratios mixture_weights",
    "phases[…].documents": "document_masking intra_document_masking reset_attention_mask reset_position_ids doc_mask",
    "phases[…].freeze": "frozen freeze_embeddings freeze_layers",
    "phases[…].batch.sequences": "batch_size global_batch_size train_batch_size total_batch_size",
    "phases[…].batch.micro": "micro_batch_size device_batch_size per_device_train_batch_size "
    "train_micro_batch_size_per_gpu gradient_accumulation_steps grad_accum_steps grad_accum accumulate_grad_batches",
    "phases[…].batch.context": "window window_size window_length train_context training_context",
    "phases[…].optimizer.lr": "learning_rate max_lr peak_lr base_lr adam_lr",
    "phases[…].optimizer.betas": "beta1 beta2 beta adam_beta1 adam_beta2 adam_betas",
    "phases[…].optimizer.eps": "epsilon adam_eps adam_epsilon",
    "phases[…].optimizer.weight_decay": "wd decoupled_weight_decay",
    "phases[…].optimizer.clip": "grad_clip max_grad_norm gradient_clip_val gradient_clipping clip_grad clip_grad_norm "
    "max_norm",
    "phases[…].optimizer.name": "optim optimizer_name optimizer_type",
    "phases[…].schedule": "lr_scheduler scheduler lr_schedule lr_scheduler_type lr_decay_style",
    "phases[…].schedule.warmup": "warmup_steps num_warmup_steps warmup_iters lr_warmup_iters warmup_ratio",
    "phases[…].schedule.final": "min_lr final_lr min_lr_ratio end_lr lr_min",
    "phases[…].schedule.horizon": "lr_decay_iters lr_decay_steps decay_iters t_max",
    "phases[…].schedule.decay": "cooldown cooldown_steps warmdown warmdown_iters decay_fraction",
    "phases[…].eval.every": "eval_every eval_interval eval_steps val_every val_loss_every val_check_interval",
    "phases[…].eval.tokens": "eval_tokens eval_iters val_tokens eval_batches",
    "phases[…].stop": "early_stopping early_stop early_stopping_patience",
    "checkpoint.every": "save_every save_steps save_interval checkpoint_every ckpt_every save_frequency",
    "checkpoint.keep": "save_total_limit keep_last save_top_k save_num_checkpoints_to_keep",
    "log.every": "log_every log_interval logging_steps log_every_n_steps",
    "engine.stage": "zero_stage zero zero_optimization",
    "engine.offload": "cpu_offload offload_optimizer",
    "engine.config": "deepspeed deepspeed_config ds_config",
    "engine.checkpointing": "gradient_checkpointing activation_checkpointing recompute_granularity",
    "engine.name": "backend strategy distributed_backend",
}
"""Other names for our field, by its path in a recipe."""

_FOREIGN = {name: path for path, names in SYNONYMS.items() for name in names.split()}
_LAST = [path.rpartition(".")[2] for path in SYNONYMS]
_OURS = {name: path for name, path in zip(_LAST, SYNONYMS, strict=True) if _LAST.count(name) == 1}
_OURS["context"] = "model.context"
"""Fields that only one section has, or mainly one."""

_NOTES = {"phases[…].batch.micro": ", the windows of one forward pass; how many passes make a step follows from it"}


def unknown_key(given: object, known: Iterable[str]) -> str:
    """The end of the message about an unknown key: the field that it means, or the nearest known one."""
    known = list(known)
    near = nearest(str(given), known)
    path = _FOREIGN.get(str(given).lower().replace("-", "_")) or (None if "did you" in near else _OURS.get(str(given)))
    if path == "model.context" and "batch" in known:  # in a phase, where it is the window
        path = "phases[…].batch.context"
    if path is None:
        return f"unknown key; {near}"
    section, _, name = path.rpartition(".")
    of = {"": "at the top of the recipe", "phases[…]": "in a phase", "sources.NAME": "in a source"}
    where = "" if name in known else f" {of.get(section, f'in {section.rpartition(chr(46))[2]}')}"
    return f"unknown key; here it is {name}{where}{_NOTES.get(path, '')}"
