"""Train the text model from scratch on the standard library's own source (about an hour on two cores).

    python scripts/train_text_model.py --out benchmarks/text_model --minutes 60

A Llama of 3.5 million parameters (head_dim 64, grouped queries, context 1,024) with a byte-level BPE of 2,048 tokens.
It sees the training files only; the files of the other parts (`kvq/evaluation/stdlib_text.py`) are for choosing
settings and for reporting. Short sequences first, whole contexts in the second half.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvq.evaluation.stdlib_text import StdlibPart, read_stdlib

VOCABULARY_SIZE = 2048
CONTEXT_LENGTH = 1024
SHORT_LENGTH = 256
SHORT_UNTIL = 0.5
"""Share of the training up to which sequences are short."""
TOKENS_PER_STEP = 4096
END_OF_TEXT = "<|endoftext|>"
WARM_UP_STEPS = 100
PEAK_LEARNING_RATE = 2e-3


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of the training files; it has a token for every byte, so any text is encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in read_stdlib("train")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        model_max_length=CONTEXT_LENGTH,
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """Return an untrained model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.04,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def encode_part(part: StdlibPart, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return the files of one part as int64 `[T]`, each after a token that ends the one before."""
    pieces: list[int] = []
    for _, text in read_stdlib(part):
        pieces.append(tokenizer.bos_token_id)
        pieces.extend(tokenizer.backend_tokenizer.encode(text).ids)
    return torch.tensor(pieces)


def draw_batches(tokens: torch.Tensor, length: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield int64 `[TOKENS_PER_STEP / length, length]` without end; each pass over the text has its own offset."""
    rows = TOKENS_PER_STEP // length
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (len(tokens) - offset) // length
        windows = tokens[offset : offset + count * length].view(count, length)
        for chosen in torch.randperm(count, generator=generator).split(rows):
            if len(chosen) == rows:
                yield windows[chosen]


def learning_rate(step: int, share: float) -> float:
    """Return the learning rate after `step` steps, at `share` (0 to 1) of the training: warm-up, then a cosine."""
    return PEAK_LEARNING_RATE * min((step + 1) / WARM_UP_STEPS, 0.02 + 0.49 * (1 + math.cos(math.pi * share)))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, seed: int, steps: int, minutes: float) -> int:
    """Train `model` in place until `steps` or `minutes` run out, whichever comes first, and return the steps made."""
    generator = torch.Generator().manual_seed(seed)
    batches = {length: draw_batches(tokens, length, generator) for length in (SHORT_LENGTH, CONTEXT_LENGTH)}
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    start, recent, step = time.monotonic(), math.log(VOCABULARY_SIZE), 0
    for step in range(steps):
        share = max(step / steps, (time.monotonic() - start) / (60 * minutes))
        if share >= 1:
            return step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, share)
        batch = next(batches[SHORT_LENGTH if share < SHORT_UNTIL else CONTEXT_LENGTH])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent += 0.05 * (loss.item() - recent)
        if step % 50 == 0:
            print(f"{(time.monotonic() - start) / 60:5.1f} min, step {step}: loss {recent:.3f}", flush=True)
    return steps


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: torch.Tensor, sequences: int = 64) -> float:
    """Return the mean loss per token in nats over whole contexts, evenly spaced over `tokens`."""
    starts = torch.linspace(0, len(tokens) - CONTEXT_LENGTH, sequences).long().tolist()
    losses = [
        model(batch, labels=batch, use_cache=False).loss.item()
        for batch in (tokens[start : start + CONTEXT_LENGTH][None] for start in starts)
    ]
    return sum(losses) / len(losses)


def main() -> None:
    """Train a model and write weights (bfloat16), configuration, tokenizer and `training.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, configuration and tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this time, at any step")
    arguments = parser.parse_args()

    start = time.monotonic()
    tokenizer = train_tokenizer()
    tokens = encode_part("train", tokenizer)
    model = build_model(arguments.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokens):,} tokens of text", flush=True)
    steps = train(model, tokens, arguments.seed, arguments.steps, arguments.minutes)
    minutes = (time.monotonic() - start) / 60
    model.eval().to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    model.float()
    record = {
        "seed": arguments.seed,
        "steps": steps,
        "minutes": round(minutes, 1),
        "python": platform.python_version(),
        "training_tokens": len(tokens),
        "loss": {part: round(evaluate(model, encode_part(part, tokenizer)), 4) for part in ("train", "calibration")},
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
