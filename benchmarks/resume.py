"""What conversations compute again after a restart, and how long their first token takes, with and without `--kv-disk`.

    .venv/bin/python benchmarks/resume.py [--conversations 100] [--tokens 4000] [--model PATH]

The server is killed by SIGKILL once all is written, and started again. Without --model: a small random Llama, for which
reading saves little time; what is computed is counted in any case.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx

BLOCK = 16
ANSWER = 8
STARTING = 300.0  # seconds
WRITING = 600.0


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server of its own process, and its URL."""
    log = folder / "output"
    command = [sys.executable, "-m", "lmserve", "serve", *arguments, "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + STARTING
        while True:
            printed = log.read_text("utf-8")
            url = re.search(r"^API +(http://\S+)$", printed, re.MULTILINE)
            if url and re.search("^Ready", printed, re.MULTILINE):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{printed}")
            time.sleep(0.05)
        yield process, url[1]
    finally:
        process.kill()
        process.wait()


def random_llama(folder: Path, longest: int) -> Path:
    """A Llama with random weights, whose tokens are bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=longest,
        initializer_range=0.1,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: at for at, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def metric(url: str, name: str) -> int:
    values = re.findall(rf"^{name}(?:{{.*}})? (\d+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return sum(map(int, values))


def turn(url: str, session: int, **fields: Any) -> tuple[dict[str, int], float]:
    """Usage of a turn, and seconds to its first token."""
    body = {"instance_id": session, "request_output_len": ANSWER, "temperature": 0, "ignore_eos": True, "stream": True}
    begin = time.perf_counter()
    first, last = 0.0, b""
    with httpx.stream("POST", f"{url}/generate", json=body | fields, timeout=3600) as reply:
        if reply.status_code != 200:
            raise RuntimeError(reply.read().decode())
        for chunk in reply.iter_raw():
            first = first or time.perf_counter() - begin
            last += chunk
    frame = json.loads(last.rstrip(b"\0").rpartition(b"\0")[2])
    return frame["usage"], first


def settle(url: str) -> None:
    """Wait until nothing more is written."""
    deadline = time.monotonic() + WRITING
    before = -1
    while (written := metric(url, "lmserve_tier_written_bytes_total")) != before:
        if time.monotonic() > deadline:
            raise RuntimeError("the disk is too slow")
        before = written
        time.sleep(1)


def resume(url: str, conversations: int) -> tuple[int, int, list[float]]:
    """Prompt tokens, those of them that were computed, and seconds to the first token of each conversation."""
    before = metric(url, "lmserve_computed_tokens_total")
    turns = [turn(url, at, prompt="And then?", sequence_start=False) for at in range(conversations)]
    computed = metric(url, "lmserve_computed_tokens_total") - before - conversations * (ANSWER - 1)
    return sum(usage["prompt_tokens"] for usage, _ in turns), computed, [first for _, first in turns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lmserve-resume-") as scratch:
        folder = Path(scratch)
        longest = arguments.tokens + 512
        model = arguments.model or random_llama(folder / "model", longest)
        settings = [str(model), "--max-model-len", str(longest), "--session-dir", str(folder / "sessions")]
        # Drafts would count as computed tokens.
        settings += ["--speculate", "0"]
        tiers = [*settings, "--kv-disk", f"{folder / 'kv'},50GiB"]
        with serving(folder, *tiers) as (process, url):
            card = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
            words = " ".join(f"word {number}" for number in range(1000, 1000 + arguments.tokens))
            sample = words[:400]
            count = httpx.post(f"{url}/tokenize", json={"model": card, "prompt": sample}).json()["count"]
            size = len(sample) * arguments.tokens // count
            for at in range(arguments.conversations):
                turn(url, at, prompt=f"{at} {words}"[: size - 100], sequence_start=True)
            settle(url)
            process.send_signal(signal.SIGKILL)
            process.wait()
        print(
            f"{arguments.conversations} conversations of about {arguments.tokens} tokens, after SIGKILL and a new start"
        )
        print(f"{'':24} {'prompt tokens':>14} {'computed':>10} {'share':>8} {'first token':>12}")
        found = {}
        for name, flags in (("with --kv-disk", tiers), ("without", settings)):
            # Each goes on from the same log.
            with serving(folder, *flags) as (process, url):
                prompts, computed, first = resume(url, arguments.conversations)
                found[name] = computed / prompts
                share_text = f"{100 * computed / prompts:.2f} %"
                print(
                    f"{name:24} {prompts:14} {computed:10} {share_text:>8} {1000 * median(first):9.1f} ms", flush=True
                )
                process.send_signal(signal.SIGKILL)
                process.wait()
        if found["with --kv-disk"] >= 0.03:
            sys.exit("more than 3 % were computed again")


if __name__ == "__main__":
    main()
