"""Fit a cache to a model in Python, write it as YAML, and generate with it.

    python examples/tuned.py
    python examples/tuned.py --bits 5
    python examples/tuned.py --model smollm2 --bits 4.16

Without `--model` it runs offline on the small recall model that ships with kvq, in some seconds. `kvq tune` does the
same on the command line, with tables, a picture and the whole front.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from kvq import attach
from kvq.evaluation.model_loading import EMBEDDED_NAME, load_model
from kvq.evaluation.quality.text import load_dataset
from kvq.tuning import Goal, Grid, SearchSpace, TuningPlan, default_base, find_quantizable, group_layers, tune

CONTEXT = 4096
"""Tokens that the bytes are counted at."""


def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load_model(arguments.model, on_step=print)
    topic = "recall" if arguments.model == EMBEDDED_NAME else "topics"
    calibration = load_dataset(f"{topic}-calibration", tokenizer, sequences=2, length=400)
    held_out = load_dataset(f"{topic}-report", tokenizer, sequences=2, length=400)

    # What may be chosen: these bits for keys and for values of every layer, by the method of today's defaults.
    base = default_base()
    settings = tuple(Grid(bits=(2, 3, 4, 8)).settings())
    groups, _ = group_layers(find_quantizable(model, base))
    plan = TuningPlan(
        model,
        text=calibration,
        held_out=held_out,
        space=SearchSpace(keys=settings, values=settings, groups=groups),
        goal=Goal(CONTEXT, bits=arguments.bits),
        base=base,
        tries=7,
    )
    found = tune(plan)

    arguments.out.write_text(found.config.to_yaml(), encoding="utf-8")
    for index, pair in found.tuned.assignment.items():
        print(f"layer {index}: {pair.key.nbits} bits for keys, {pair.value.nbits} for values")
    print(f"bits:      {found.tuned.bits:.2f} an element at {CONTEXT:,} tokens, everything included")
    print(f"KL:        {found.records[0].kl} on the held-out text")
    if found.uniform is not None:
        print(f"uniform:   {found.uniform[1].kl} with the same bits in all layers, in no more bytes")

    prompt = held_out.sequences[:1, :300].to(model.device)
    with attach(model, str(arguments.out)), torch.no_grad():
        output = model.generate(prompt, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    print(f"generated: {tokenizer.decode(output[0, prompt.shape[1] :])}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fit a cache to a model, and generate with it.")
    parser.add_argument(
        "--model",
        default=EMBEDDED_NAME,
        metavar="PATH_OR_ID",
        help="a causal model, or 'smollm2': a real one, fetched once; default: the embedded one, offline",
    )
    parser.add_argument("--bits", type=float, default=4.5, metavar="BITS", help="most bits an element; default: 4.5")
    parser.add_argument(
        "--out", type=Path, default=Path("tuned.yaml"), metavar="FILE", help="the configuration; default: tuned.yaml"
    )
    parser.add_argument("--max-new-tokens", type=int, default=5, metavar="N", help="default: 5")
    return parser.parse_args()


if __name__ == "__main__":
    main()
