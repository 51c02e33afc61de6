"""Train the embedded recall model from scratch (about half an hour on two cores).

    python scripts/train_recall_model.py --out build/recall_model --seed 0
    python scripts/train_recall_model.py --out build/recall_model --evaluate-only --seed 12345

Retrieval from a long context is not learned from a cold start, so the task grows with the ability: first sequences that
repeat themselves with a period of their own, then few records, then more as soon as the present number is answered
almost always.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvq.evaluation import recall

REPEAT_STAGES = ((3, 10, 32), (3, 24, 72), (4, 60, 160))
"""Shortest and longest period and length of the sequences, in tokens, of each stage of the warm-up."""
RECORD_STAGES = (8, 16, 32, 64, 110, 166)
"""Most records in a context of each stage after that."""
TOKENS_PER_STEP = 2048
ADVANCE_AT = 0.95
MAX_QUESTIONS = 64


def build_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(recall.VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.06,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=recall.PAD,
        bos_token_id=recall.BOS,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(recall.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", padding_side="left"
    )


def training_loss(model: LlamaForCausalLM, batch: recall.RecallBatch) -> tuple[torch.Tensor, float]:
    """Return the loss on the answers and the share of exactly answered questions."""
    sequence = torch.cat([batch.context, batch.questions.flatten(1)], dim=1)
    hidden = model.model(sequence).last_hidden_state[:, batch.context.shape[1] :]
    hidden = hidden.unflatten(1, batch.questions.shape[1:])[:, :, 1:-1]
    targets = batch.questions[:, :, 2:]
    logits = model.lm_head(hidden)
    loss = functional.cross_entropy(logits.flatten(0, 2), targets.flatten())
    exact = (logits.argmax(-1) == targets)[..., : recall.ANSWER_LENGTH].all(-1).float().mean()
    return loss, exact.item()


def repetition_loss(
    model: LlamaForCausalLM, stage: tuple[int, int, int], generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Return loss and accuracy on sequences that repeat random tokens, past the first period of each."""
    shortest, longest, length = stage
    rows = TOKENS_PER_STEP // 2 // length
    periods = torch.randint(shortest, longest + 1, (rows, 1), generator=generator)
    tokens = torch.randint(recall.STOP + 1, len(recall.VOCABULARY), (rows, longest), generator=generator)
    positions = torch.arange(length)
    sequence = tokens.gather(1, positions % periods)
    logits = model(sequence).logits[:, :-1]
    known = (positions[1:] > periods).expand(rows, -1)
    targets = sequence[:, 1:][known]
    return functional.cross_entropy(logits[known], targets), (logits[known].argmax(-1) == targets).float().mean().item()


def sample_for_training(records: int, generator: torch.Generator) -> recall.RecallBatch:
    questions = min(records, MAX_QUESTIONS)
    length = 1 + records * recall.RECORD_LENGTH + questions * recall.QUESTION_LENGTH
    return recall.sample_recall_batch(
        max(2, TOKENS_PER_STEP // length), records, questions, generator=generator
    )


def build_optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, under which retrieval is found several times sooner, AdamW for the rest."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(hidden, lr=10 * learning_rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, seed: int, minutes: float, learning_rate: float) -> int:
    generator = torch.Generator().manual_seed(seed)
    optimizers = build_optimizers(model, learning_rate)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    stages = [*REPEAT_STAGES, *RECORD_STAGES]
    start, stage, step, recent = time.monotonic(), 0, 0, 0.0
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 50) * min(1.0, 2.5 * (1 - share) + 0.02)
        current = stages[stage]
        if isinstance(current, tuple):
            loss, exact = repetition_loss(model, current, generator)
        else:
            records = int(torch.randint(current // 2, current + 1, (1,), generator=generator))
            loss, exact = training_loss(model, sample_for_training(records, generator))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        recent, step = 0.95 * recent + 0.05 * exact, step + 1
        if step % 100 == 0:
            minute = (time.monotonic() - start) / 60
            print(f"{minute:5.1f} min, step {step}, stage {current}: loss {loss.item():.4f}, exact {recent:.3f}", flush=True)
        if recent > ADVANCE_AT and stage < len(stages) - 1:
            stage, recent = stage + 1, 0.0
    return step


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, seed: int, questions: int = 2000) -> dict[str, float]:
    """Return the share of exactly answered unseen questions, by number of records in the context."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for records in (40, 80, 120, 160):
        exact = []
        for _ in range(questions // 4 // 20):
            batch = recall.sample_recall_batch(2, records, 10, generator=generator)
            exact.append(training_loss(model, batch)[1])
        scores[str(1 + records * recall.RECORD_LENGTH)] = sum(exact) / len(exact)
    scores["all"] = sum(scores.values()) / len(scores)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, configuration and tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--evaluate-only", action="store_true", help="score the model in --out on unseen questions")
    arguments = parser.parse_args()
    if arguments.evaluate_only:
        model = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32).eval()
        print(json.dumps(evaluate(model, arguments.seed), indent=1))
        return
    model = build_model(arguments.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    steps = train(model, arguments.seed, arguments.minutes, arguments.learning_rate)
    model.eval().to(torch.bfloat16).save_pretrained(arguments.out)
    build_tokenizer().save_pretrained(arguments.out)
    scores = evaluate(model.float(), seed=1_000_003 + arguments.seed)
    (arguments.out / "training.json").write_text(
        json.dumps({"seed": arguments.seed, "steps": steps, "exact": scores}, indent=1) + "\n"
    )
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
