"""Read a long document once, save the quantized cache, and ask many questions of it, now and in later runs.

    python examples/long_document_qa.py
    python examples/long_document_qa.py --cache document.safetensors
    python examples/long_document_qa.py --model smollm2
    python examples/long_document_qa.py --model PATH_OR_ID --document FILE --question "Who ...?" --question "When ...?"

The document is fed to the model once. Its cache goes to a file, comes back from it, and every question is asked of a
fork, which shares the quantized tokens. A second run with the same `--cache` does not read the document again. Without
`--model` it runs offline on the small recall model that ships with kvq, whose document is a list of records; for any
other model the document is some of Python's manual.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvq import KVQ
from kvq.evaluation.model_loading import EMBEDDED_NAME, load_model
from kvq.evaluation.recall import decode_tokens, sample_recall_batch

QUESTIONS = 8


def main() -> None:
    arguments = parse_arguments()
    is_embedded = arguments.model == EMBEDDED_NAME
    model, tokenizer = load_model(arguments.model, on_step=print)
    document, asked = build_records() if is_embedded else MANUAL
    if arguments.document:
        document, asked = arguments.document.read_text(encoding="utf-8"), []
    asked = [(question, None) for question in arguments.question] or asked
    max_new_tokens = arguments.max_new_tokens or (4 if is_embedded else 30)
    with TemporaryDirectory() as folder:
        path = arguments.cache or Path(folder) / "document.safetensors"
        if path.exists():
            print(f"read before: {path}")
        else:
            read_document(model, tokenizer, document, path)
        cache = KVQ.load(path, model=model)
    print(f"loaded: {cache.get_seq_length()} tokens")
    for question, right in asked:
        print(f"\nquestion: {question.strip()}")
        print(f"answer:   {answer(model, tokenizer, cache, question, max_new_tokens)}")
        if right:
            print(f"right:    {right}")
    print(f"\n{cache.memory()}")


def read_document(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, document: str, path: Path) -> None:
    """Feed the document to the model and save the cache."""
    token_ids = tokenizer(document, return_tensors="pt")["input_ids"].to(model.device)
    cache = KVQ(model=model)
    with torch.inference_mode():
        model(token_ids, past_key_values=cache, logits_to_keep=1)
    cache.save(path, token_ids=token_ids)
    print(f"read now: {token_ids.shape[1]} tokens, saved in {path.stat().st_size / 1024:.0f} KiB")


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: KVQ, question: str, max_new_tokens: int
) -> str:
    """Ask a fork of the cache, which stays as it is."""
    asked = tokenizer(question, return_tensors="pt", add_special_tokens=False)["input_ids"]
    token_ids = torch.cat([cache.token_ids, asked], dim=1).to(model.device)
    output = model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        past_key_values=cache.fork(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return tokenizer.decode(output[0, token_ids.shape[1] :], skip_special_tokens=True).strip()


def build_records() -> tuple[str, list[tuple[str, str | None]]]:
    """Return 160 records in words of the embedded model, and questions with their right answers."""
    batch = sample_recall_batch(1, 160, QUESTIONS, generator=torch.Generator().manual_seed(1))
    pairs = zip(batch.questions[0], batch.answers[0], strict=True)
    asked = [(decode_tokens(question[:2].tolist()), decode_tokens(right.tolist())) for question, right in pairs]
    return decode_tokens(batch.context[0].tolist()), asked


SECTIONS = ("assert", "for", "lambda", "while", "del")
QUESTIONS_ON_SECTIONS = (
    "what is the assert statement for?",
    "what does the break statement do?",
    "what is a lambda expression?",
)
MANUAL: tuple[str, list[tuple[str, str | None]]] = (
    "\n".join(topics[name] for name in SECTIONS),
    [(f"\n\nQuestion: {question}\nAnswer:", None) for question in QUESTIONS_ON_SECTIONS],
)
"""A document for any language model, and questions, to which many answers are right."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask many questions of a document that is read once.")
    parser.add_argument(
        "--model",
        default=EMBEDDED_NAME,
        metavar="PATH_OR_ID",
        help="a causal model, or 'smollm2': a real one, fetched once; default: the embedded one, offline",
    )
    parser.add_argument("--document", type=Path, metavar="FILE", help="a text; default: a long list, or a manual")
    parser.add_argument("--question", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--cache", type=Path, metavar="FILE", help="where the cache is kept; default: only for this run"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 4, with --model 30")
    return parser.parse_args()


if __name__ == "__main__":
    main()
