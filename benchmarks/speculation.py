"""What `--speculate` comes to: answers that repeat their prompts, and answers that do not, with it and without.

    .venv/bin/python benchmarks/speculation.py [MODEL] [--speculate 8] [--batches 1 8] [--rounds 2] [--workloads chat]

MODEL is a GGUF file or a model folder (default: the bundled one). Prompts are cached before anything is measured,
engines take turns, and the fastest round of each counts. That the answers are the same is checked.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

from lmserve.assets import SMOLLM2, fetch
from lmserve.engine.llm import LLM
from lmserve.engine.submission import SamplingParams, StopParams

REPOSITORY = Path(__file__).parents[1]
OUTPUT = StopParams(max_tokens=128)
SAMPLING = {"greedy": SamplingParams(temperature=0.0), "0.8": SamplingParams(temperature=0.8, top_p=0.95, seed=7)}
QUESTIONS = (
    "Write a short story about a lighthouse keeper.",
    "Explain how photosynthesis works.",
    "What should I cook tonight?",
    "Give me advice on learning the piano.",
    "Describe the city of Lisbon.",
    "Why is the sky blue?",
    "Write a poem about winter.",
    "How do airplanes fly?",
)


def workloads() -> dict[str, list[str]]:
    """Prompts over this repository's own text and code."""
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    texts = [text for page in pages for text in page.read_text().split("\n\n") if 300 < len(text) < 1500]
    texts = [text for text in texts if text[0].isalpha()][:16]
    sources = [path.read_text() for path in sorted((REPOSITORY / "python").rglob("*.py"))]
    functions = [code for source in sources for code in re.findall(r"^def [\s\S]*?(?=\n\n\n|\Z)", source, re.MULTILINE)]
    functions = [code for code in functions if 300 < len(code) < 1500][:8]
    return {
        "correction": [f"Correct the spelling of this text and return the whole text:\n\n{text}" for text in texts[:8]],
        "code edit": [
            f"Add a docstring to this function and return the whole function:\n\n{code}" for code in functions
        ],
        "summary": [f"Summarize this text, using its own words:\n\n{text}" for text in texts[8:]],
        "chat": list(QUESTIONS),
    }


def drafts(llm: LLM) -> tuple[int, int]:
    """Tokens drafted and accepted since the start."""
    stats = llm.stats()
    return int(stats["drafted_tokens"]), int(stats["accepted_tokens"])


def main() -> None:
    """Print a table for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--speculate", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="*", default=(1, 8))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workloads", nargs="*", default=list(workloads()), choices=list(workloads()))
    arguments = parser.parse_args()
    path = arguments.model or fetch(SMOLLM2)
    for batch in arguments.batches:
        settings = {"max_model_len": 2048, "max_batch": batch, "kv_memory": 512 << 20}
        with LLM.load(path, **settings) as plain, LLM.load(path, speculate=arguments.speculate, **settings) as drafting:
            print(f"\nbatch {batch}\n\n| | sampling | tokens/s | speculating | ratio | accepted |")
            print("|---|---|---|---|---|---|")
            for name in arguments.workloads:
                prompts = workloads()[name]
                conversations = [[{"role": "user", "content": prompt}] for prompt in prompts * (2 if batch > 1 else 1)]
                for llm in (plain, drafting):
                    llm.chat(conversations, stopping=StopParams(max_tokens=1))
                for sampling in SAMPLING:
                    compare(name, conversations, sampling, plain, drafting, arguments.rounds)


def compare(
    name: str, conversations: list[list[dict[str, str]]], sampling: str, plain: LLM, drafting: LLM, rounds: int
) -> None:
    """Print a row."""
    rates: dict[LLM, float] = {}
    answers = []
    before = drafts(drafting)
    for llm in (plain, drafting) * rounds:
        begin = time.perf_counter()
        generations = llm.chat(conversations, SAMPLING[sampling], OUTPUT)
        seconds = time.perf_counter() - begin
        rates[llm] = max(rates.get(llm, 0.0), sum(generation.tokens for generation in generations) / seconds)
        answers.append([generation.text for generation in generations])
    if any(answer != answers[0] for answer in answers):
        raise SystemExit(f"{name}: the answers differ")
    drafted, accepted = (now - then for now, then in zip(drafts(drafting), before, strict=True))
    share = f"{accepted / max(1, drafted):.0%} of {drafted // rounds}"
    ratio = rates[drafting] / rates[plain]
    print(f"| {name} | {sampling} | {rates[plain]:.0f} | {rates[drafting]:.0f} | {ratio:.2f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
