"""Read a long document once, save the quantized cache, and ask many questions of it, now and in later runs.

    python examples/long_document_qa.py
    python examples/long_document_qa.py --cache document.safetensors
    python examples/long_document_qa.py --model PATH_OR_ID --document FILE --question "Who ...?" --question "When ...?"

The document is fed to the model once. Its cache goes to a file, comes back from it, and every question is asked of a
fork, which shares the quantized tokens. A second run with the same `--cache` does not read the document again. Without
`--model` it runs offline on the small recall model that ships with kvq, whose document is a list of records.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvq import KVQ
from kvq.evaluation.embedded_model import load_embedded_model
from kvq.evaluation.recall import decode_tokens, sample_recall_batch

QUESTIONS = 8


def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load_model(arguments.model)
    document, asked = build_facts() if arguments.model else build_records()
    if arguments.document:
        document, asked = arguments.document.read_text(encoding="utf-8"), []
    asked = [(question, None) for question in arguments.question] or asked
    max_new_tokens = arguments.max_new_tokens or (30 if arguments.model else 4)
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


def load_model(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model and its tokenizer; the embedded ones where `name` is None."""
    if name is None:
        return load_embedded_model()
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), AutoTokenizer.from_pretrained(name)


def build_records() -> tuple[str, list[tuple[str, str | None]]]:
    """Return 160 records in words of the embedded model, and questions with their right answers."""
    batch = sample_recall_batch(1, 160, QUESTIONS, generator=torch.Generator().manual_seed(1))
    pairs = zip(batch.questions[0], batch.answers[0], strict=True)
    asked = [(decode_tokens(question[:2].tolist()), decode_tokens(right.tolist())) for question, right in pairs]
    return decode_tokens(batch.context[0].tolist()), asked


def build_facts() -> tuple[str, list[tuple[str, str | None]]]:
    """Return a document for any language model, and questions with their right answers."""
    facts = "\n".join(f"Locker {number} holds {number * 37 % 101} coins." for number in range(1, 201))
    asked = range(12, 200, 200 // QUESTIONS)
    questions = [f"\n\nQuestion: how many coins does locker {number} hold?\nAnswer:" for number in asked]
    return facts, [(question, f"{number * 37 % 101}") for question, number in zip(questions, asked, strict=True)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask many questions of a document that is read once.")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a causal model; default: the embedded one, offline")
    parser.add_argument("--document", type=Path, metavar="FILE", help="a text; default: a long list")
    parser.add_argument("--question", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--cache", type=Path, metavar="FILE", help="where the cache is kept; default: only for this run"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 4, with --model 30")
    return parser.parse_args()


if __name__ == "__main__":
    main()
