"""Tokens a second of `GPT.generate`, against a pass over the whole text for every token, in interleaved rounds.

    python -m benchmarks.generate [--preset 10m] [--tokens 512] [--batch 8] [--rounds 3] [--threads 1]

Greedy, fp32, from a prompt of 8 tokens, with random weights; all texts must be equal.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.machine import machine
from spt_fast.model.gpt import GPT, GPTConfig


@torch.no_grad()
def uncached(model: GPT, tokens: list[int], new_tokens: int) -> list[int]:
    for _ in range(new_tokens):
        tokens = [*tokens, int(model(torch.tensor([tokens]))[0, -1].argmax())]
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="10m")
    for flag, default in (("--tokens", 512), ("--batch", 8), ("--rounds", 3), ("--threads", 1)):
        parser.add_argument(flag, type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = GPT(GPTConfig.preset(given.preset, context=given.tokens + 8))
    prompts = [[n, *range(1, 8)] for n in range(given.batch)]
    contenders = {
        "uncached": lambda: [uncached(model, prompts[0], given.tokens)],
        "cached": lambda: [model.generate(prompts[0], given.tokens, temperature=0)],
        f"batch of {given.batch}": lambda: model.generate_batch(prompts, given.tokens, temperature=0),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(given.rounds):
        texts = []
        for name, generate in contenders.items():
            began = time.perf_counter()
            texts.append(generate())
            speeds[name].append(len(texts[-1]) * given.tokens / (time.perf_counter() - began))
        assert all(text[0] == texts[0][0] for text in texts), "the texts differ"
    print(machine("torch"))
    for name, rates in speeds.items():
        ratio = statistics.median(mine / base for mine, base in zip(rates, speeds["uncached"], strict=True))
        shown = ", ".join(f"{rate:,.1f}" for rate in rates)
        print(f"{name}: {statistics.median(rates):,.1f} tokens/s ({shown}), {ratio:.1f} times uncached")


if __name__ == "__main__":
    main()
