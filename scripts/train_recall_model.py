"""Train the embedded recall model from scratch (about twenty minutes on one core).

    python scripts/train_recall_model.py --out build/recall_model --seed 0
    python scripts/train_recall_model.py --out build/recall_model --evaluate-only --seed 12345

Retrieval from a long context is not learned from a cold start: a key is of use only once the token after it carries it,
and the token after it has no reason to carry it before keys are of use. Two things break that circle. An auxiliary
loss, whose map is thrown away after training, asks the output of the first layer for the tokens just before each
position. And the contexts grow with the ability: few records first, more as soon as most questions about them are
answered exactly.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvq.evaluation import recall

RECORD_STAGES = (6, 12, 24, 48, 96, 166)
"""Most records in a context of each stage of the curriculum."""
ADVANCE_AT = 0.9
"""Running share of exactly answered questions at which the next stage begins."""
TOKENS_PER_STEP = 2048
MAX_QUESTIONS = 64
"""Most questions in one training sequence."""
PREVIOUS_TOKENS = 3
"""How many earlier tokens the auxiliary loss asks of the first layer at each position."""
PREVIOUS_STRIDE = 3
"""The auxiliary loss looks at every third position only, to save time."""
PREVIOUS_WEIGHT = 0.5
WARM_UP_STEPS = 50
DECAY_FROM = 0.5
"""Share of the training after which the learning rate falls linearly to zero."""


def build_model(seed: int, layers: int) -> LlamaForCausalLM:
    """Return an untrained model.

    Three departures from the default initialisation: embeddings of unit variance, so the layers do not drown the
    token in the residual stream; a final norm that brings the tied logits back to unit variance; random biases of
    queries and keys, from which heads that look at a fixed distance grow.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(recall.VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        initializer_range=0.06,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=recall.PAD,
        bos_token_id=recall.BOS,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        model.model.norm.weight.fill_(1 / math.sqrt(config.hidden_size))
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_(std=0.5)
            layer.self_attn.k_proj.bias.normal_(std=0.5)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the task: one token a word or mark, full stops split off."""
    vocabulary = {token: index for index, token in enumerate(recall.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        padding_side="left",
    )


def score_answers(logits: torch.Tensor, batch: recall.RecallBatch) -> tuple[torch.Tensor, float]:
    """Return the loss on the answers and the share of exactly answered questions.

    Args:
        logits: float `[B, T, V]` over context and questions, one after the other.
        batch: what the logits were computed from.
    """
    logits = logits[:, batch.context.shape[1] :].unflatten(1, batch.questions.shape[1:])[:, :, 1:-1]
    targets = batch.questions[:, :, 2:]
    loss = functional.cross_entropy(logits.flatten(0, 2), targets.flatten())
    exact = (logits.argmax(-1) == targets)[..., : recall.ANSWER_LENGTH].all(-1).float().mean()
    return loss, exact.item()


def previous_token_loss(
    model: LlamaForCausalLM, probe: nn.Linear, hidden: torch.Tensor, sequence: torch.Tensor
) -> torch.Tensor:
    """Return the loss of naming the `PREVIOUS_TOKENS` tokens before a position from the first layer's output.

    Args:
        model: its embeddings name the tokens.
        probe: maps one hidden state to `PREVIOUS_TOKENS` of them.
        hidden: float `[B, T, hidden_size]`, output of the first layer.
        sequence: int64 `[B, T]`, the tokens.
    """
    windows = sequence[:, :-1].unfold(1, PREVIOUS_TOKENS, PREVIOUS_STRIDE)
    hidden = hidden[:, PREVIOUS_TOKENS::PREVIOUS_STRIDE]
    hidden = functional.rms_norm(hidden, hidden.shape[-1:])
    named = probe(hidden).unflatten(-1, (PREVIOUS_TOKENS, -1))
    logits = functional.linear(named, model.get_input_embeddings().weight)
    return functional.cross_entropy(logits.flatten(0, 2), windows.flatten())


def training_losses(
    model: LlamaForCausalLM, probe: nn.Linear, batch: recall.RecallBatch
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the loss on the answers, the auxiliary loss and the share of exactly answered questions."""
    sequence = torch.cat([batch.context, batch.questions.flatten(1)], dim=1)
    output = model(sequence, output_hidden_states=True, use_cache=False)
    loss, exact = score_answers(output.logits, batch)
    return loss, previous_token_loss(model, probe, output.hidden_states[1], sequence), exact


def sample_for_training(most_records: int, generator: torch.Generator) -> recall.RecallBatch:
    """Draw about `TOKENS_PER_STEP` tokens, with a quarter of `most_records` to all of them in each context."""
    records = int(torch.randint(max(2, most_records // 4), most_records + 1, (1,), generator=generator))
    questions = min(records, MAX_QUESTIONS)
    length = 1 + records * recall.RECORD_LENGTH + questions * recall.QUESTION_LENGTH
    return recall.sample_recall_batch(max(2, TOKENS_PER_STEP // length), records, questions, generator=generator)


def learning_rate_factor(step: int, share: float) -> float:
    """Return what to multiply the learning rate by, given the steps made and the share (0 to 1) of the training."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, (1 - share) / (1 - DECAY_FROM))


def training_shares(steps: int, minutes: float) -> Iterator[float]:
    """Yield before each step the share of the training that is done, by steps or by time, whichever is further."""
    start = time.monotonic()
    for step in range(steps):
        share = max(step / steps, (time.monotonic() - start) / (60 * minutes))
        if share >= 1:
            return
        yield share


def train(model: LlamaForCausalLM, seed: int, steps: int, minutes: float, learning_rate: float) -> int:
    """Train `model` in place until `steps` or `minutes` run out and return the number of steps made."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    probe = nn.Linear(width, PREVIOUS_TOKENS * width, bias=False)
    optimizer = torch.optim.AdamW([*model.parameters(), *probe.parameters()], betas=(0.9, 0.98), weight_decay=0.01)
    start, stage, step, recent = time.monotonic(), 0, 0, 0.0
    for step, share in enumerate(training_shares(steps, minutes), start=1):
        optimizer.param_groups[0]["lr"] = learning_rate * learning_rate_factor(step, share)
        batch = sample_for_training(RECORD_STAGES[stage], generator)
        loss, auxiliary, exact = training_losses(model, probe, batch)
        optimizer.zero_grad()
        (loss + PREVIOUS_WEIGHT * auxiliary).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = 0.95 * recent + 0.05 * exact
        if step % 100 == 0:
            print(
                f"{(time.monotonic() - start) / 60:5.1f} min, step {step}, up to {RECORD_STAGES[stage]} records: "
                f"loss {loss.item():.4f}, auxiliary {auxiliary.item():.4f}, exact {recent:.3f}",
                flush=True,
            )
        if recent > ADVANCE_AT and stage < len(RECORD_STAGES) - 1:
            stage, recent = stage + 1, 0.0
    return step


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, seed: int, questions: int = 2000) -> dict[str, float]:
    """Return the share of exactly answered unseen questions, by tokens in the context and over `all`."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for records in (40, 80, 120, 160):
        exact = []
        for _ in range(questions // 4 // 20):
            batch = recall.sample_recall_batch(2, records, 10, generator=generator)
            sequence = torch.cat([batch.context, batch.questions.flatten(1)], dim=1)
            exact.append(score_answers(model(sequence, use_cache=False).logits, batch)[1])
        scores[str(1 + records * recall.RECORD_LENGTH)] = round(sum(exact) / len(exact), 6)
    scores["all"] = round(sum(scores.values()) / len(scores), 6)
    return scores


def train_and_save(arguments: argparse.Namespace) -> None:
    """Train a model and write weights (bfloat16), configuration, tokenizer and `training.json` to `arguments.out`."""
    start = time.monotonic()
    model = build_model(arguments.seed, arguments.layers)
    print(f"{model.num_parameters():,} parameters")
    steps = train(model, arguments.seed, arguments.steps, arguments.minutes, arguments.learning_rate)
    minutes = (time.monotonic() - start) / 60
    model.eval().to(torch.bfloat16).save_pretrained(arguments.out)
    build_tokenizer().save_pretrained(arguments.out)
    record = {
        "seed": arguments.seed,
        "steps": steps,
        "minutes": round(minutes, 1),
        "exact": evaluate(model.float(), seed=1_000_003 + arguments.seed),
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def main() -> None:
    """Train a model, or score one that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, configuration and tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--minutes", type=float, default=50.0, help="stop after this time, at any step")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--evaluate-only", action="store_true", help="score the model in --out on unseen questions")
    arguments = parser.parse_args()
    if arguments.evaluate_only:
        model = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32).eval()
        print(json.dumps(evaluate(model, arguments.seed), indent=1))
        return
    train_and_save(arguments)


if __name__ == "__main__":
    main()
