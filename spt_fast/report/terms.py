"""The abbreviations and terms of a report's page."""

from __future__ import annotations

TERMS: dict[str, tuple[str, str]] = {
    "domain, general": (r"domain", "the two corpora: the one that the model is specialized for, and the large one"),
    "δ, share": (r"δ|[Ss]hare", "the domain's part of the tokens of pretraining, or of another phase that is named"),
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
        "text that is never trained on; one half of it, select, serves to choose, the other, report, gives the figures",
    ),
    "epochs": (r"\bepochs?\b", "how many times the domain's corpus was read"),
    "R_gain": (r"R_gain", "by how many percent the domain loss after finetuning lies below that of NPT"),
    "forgetting": (r"[Ff]org[eo]t", "the rise of the general loss in finetuning, in nats per token"),
    "replay": (r"\breplay\b", "general text in the finetune, as a share of its tokens"),
    "anchor": (r"\banchor\b", "the strength of a decay toward the weights that the finetune starts from"),
    "averaged": (r"\baveraged?\b", "the share of the starting weights in the weights that are handed on"),
    "arm": (r"\barms?\b", "runs that differ by nothing but their seeds; in a grid, one combination of its values"),
    "seed": (r"\bseeds?\b", "a repetition with other initial weights and another order of the data; ± is over seeds"),
    "90% interval": (r"90%", "where a new run would lie 9 times out of 10, by the law"),
    "clear of seeds": (r"clear of seeds", "whether the arm is better by more than seeds differ"),
    "R², error": (r"R²", "of a law: the part of the variance that it explains, and its mean relative error"),
    "dcpt": (r"dcpt|D-CPT", "the D-CPT law: losses in continual pretraining by share, size and tokens"),
    "cmr": (r"\bcmr\b|CMR", "the law of the critical mixture ratio of continual pretraining"),
    "chinchilla": (r"chinchilla", "the law of loss by model size and tokens"),
    "parameters": (r"\bparam", "all weights of the model, embeddings included"),
    "lr": (r"\blr\b", "the peak learning rate"),
    "K, M, B, T": (r"\d[KMBT]\b", "thousands, millions, billions (10⁹) and trillions (10¹²)"),
    "FLOPs": (r"FLOPs", "floating-point operations of the training"),
}
"""Of each: what shows that a page has it (a regular expression), and what it means."""
