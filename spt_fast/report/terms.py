"""The abbreviations and terms of a report's page."""

from __future__ import annotations

TERMS: dict[str, tuple[str, str]] = {
    "domain, general": (r"domain", "the two corpora: the one that the model is specialized for, and the large one"),
    "δ, share": (r"δ|[Ss]hare", "the domain's part of the tokens of pretraining, or of another named phase"),
    "NPT": (r"\bNPT\b", "standard pretraining: on general text alone, δ = 0"),
    "SPT": (r"\bSPT\b", "specialized pretraining: the domain is mixed in from the start; SPT 2% is δ = 2%"),
    "SCPT": (r"\bSCPT\b", "standard pretraining first, then a last part with the domain mixed in"),
    "FT": (r"\bFT\b", "finetuning on the domain, after pretraining"),
    "loss, nats per token": (
        r"\bloss",
        "the mean of −ln p over the tokens of a text; 0.01 nats lower is a perplexity about 1% lower",
    ),
    "held out": (
        r"held[- ]out",
        "text that is never trained on; its select half is for choices, its report half for results",
    ),
    "epochs": (r"\bepochs?\b", "how many times the domain's corpus was read"),
    "R_gain": (r"R_gain", "by how many percent the domain loss after finetuning is below that of NPT"),
    "forgetting": (r"[Ff]org[eo]t", "the rise of the general loss in finetuning, in nats per token"),
    "replay": (r"\breplay\b", "general text in the finetune, as a share of its tokens"),
    "anchor": (r"\banchor\b", "the strength of a decay toward the weights that the finetune starts from"),
    "averaged": (r"\baveraged?\b", "the share of the starting weights in the final weights"),
    "arm": (r"\barms?\b", "runs that differ only by their seeds; in a grid, one combination of its values"),
    "seed": (r"\bseeds?\b", "a repetition with other initial weights and data order; ± is over seeds"),
    "90% interval": (r"90%", "the range in which the law expects 9 of 10 new runs"),
    "clear of seeds": (r"clear of seeds", "whether the arm is better by more than the spread between seeds"),
    "R², error": (r"R²", "of a law: the share of the variance that it explains, and its mean relative error"),
    "dcpt": (r"dcpt|D-CPT", "the D-CPT law: losses in continual pretraining by share, size and tokens"),
    "cmr": (r"\bcmr\b|CMR", "the law of the critical mixture ratio of continual pretraining"),
    "chinchilla": (r"chinchilla", "the law of loss by model size and tokens"),
    "acc, acc_norm": (
        r"\bacc(_norm)?\b",
        "the share of a task's questions whose most likely choice is right, by its whole text and per character",
    ),
    "parameters": (r"\bparam", "all weights of the model, embeddings included"),
    "lr": (r"\blr\b", "the peak learning rate"),
    "K, M, B, T": (r"\d[KMBT]\b", "thousands, millions, billions (10⁹) and trillions (10¹²)"),
    "FLOPs": (r"FLOPs", "floating-point operations of the training"),
}
"""For each: a regular expression that finds it on a page, and its meaning."""
