"""The page of /metrics: the core's metrics with the model's name, those of HTTP, and the names of other servers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from lmserve import __version__
from lmserve.engine.memory import resident_memory

SAMPLE: Final = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
SUFFIXES: Final = ("_bucket", "_sum", "_count")

# Names of vLLM and llama.cpp for what the core counts under a name of its own.
ALIASES: Final = (
    ("vllm:num_requests_running", "lmserve_requests_running"),
    ("vllm:num_requests_waiting", "lmserve_requests_waiting"),
    ("vllm:num_preemptions_total", "lmserve_preemptions_total"),
    ("vllm:prompt_tokens_total", "lmserve_prompt_tokens_total"),
    ("vllm:generation_tokens_total", "lmserve_generated_tokens_total"),
    ("vllm:prefix_cache_queries_total", "lmserve_prompt_tokens_total"),
    ("vllm:prefix_cache_hits_total", "lmserve_prefix_cache_hit_tokens_total"),
    ("vllm:time_to_first_token_seconds", "lmserve_time_to_first_token_seconds"),
    ("vllm:inter_token_latency_seconds", "lmserve_inter_token_seconds"),
    ("vllm:time_per_output_token_seconds", "lmserve_inter_token_seconds"),
    ("vllm:e2e_request_latency_seconds", "lmserve_request_seconds"),
    ("vllm:request_queue_time_seconds", "lmserve_queue_seconds"),
    ("vllm:request_success_total", "lmserve_requests_total"),
    ("llamacpp:requests_processing", "lmserve_requests_running"),
    ("llamacpp:requests_deferred", "lmserve_requests_waiting"),
    ("llamacpp:prompt_tokens_total", "lmserve_prompt_tokens_total"),
    ("llamacpp:tokens_predicted_total", "lmserve_generated_tokens_total"),
    ("llamacpp:n_decode_total", "lmserve_steps_total"),
)
# vLLM's dashboards choose the model by this label.
MODEL_LABELS: Final = {"vllm": "model_name", "lmserve": "model"}
# Of the process, whatever the number of its models.
PROCESS: Final = "process_"
KV_BLOCKS: Final = "lmserve_kv_blocks"
KV_USE: Final = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "llamacpp:kv_cache_usage_ratio")
# Kinds of tokens, and what /v1/usage calls them.
KEY_TOKENS: Final = {"prompt": "prompt_tokens", "cached": "cached_tokens", "generated": "completion_tokens"}


@dataclass
class Family:
    """A metric with its samples: (suffix of the name, labels as written, value as written)."""

    kind: str = "untyped"
    help: str = ""
    samples: list[tuple[str, str, str]] = field(default_factory=list)


def page(
    core: str,
    model: str | None,
    http: Mapping[tuple[str, int], int],
    keys: Mapping[str, Mapping[str, int]],
    *,
    response_log_faulty: bool = False,
) -> str:
    """Prometheus' text format. `core`: the core's own page. `model`: whose it is; None: of none alone.

    `http`: requests by route and status. `keys`: by name, what each uses, as /v1/usage tells it.
    """
    families = parsed(core)
    build = Family("gauge", "Always 1. The label is the running version.", [("", f'version="{__version__}"', "1")])
    replies = Family("counter", "HTTP replies, by route and status.")
    for (route, status), count in http.items():
        replies.samples.append(("", f'route="{quoted(route)}",status="{status}"', str(count)))
    faulty = Family("gauge", "1 while the log of stored responses cannot be written.")
    faulty.samples.append(("", "", str(int(response_log_faulty))))
    ours = {
        **families,
        **_of_process(),
        "lmserve_build_info": build,
        "lmserve_http_requests_total": replies,
        "lmserve_response_log_faulty": faulty,
        **_of_keys(keys),
    }
    lines = [line for name, family in ours.items() for line in _lines(name, family, model)]
    return "\n".join([*lines, *_aliases(families, model), ""])


def merged(pages: Sequence[str]) -> str:
    """The pages of several models as one. Samples differ in the model's label; those of the process are the same."""
    families: dict[str, Family] = {}
    for text in pages:
        for name, family in parsed(text).items():
            known = families.setdefault(name, Family(family.kind, family.help))
            if not known.samples or not name.startswith(PROCESS):
                known.samples += family.samples
    return "\n".join([*(line for name, family in families.items() for line in _lines(name, family, None)), ""])


def _of_process() -> dict[str, Family]:
    memory = resident_memory()
    if memory is None:
        return {}
    total = Family("gauge", "Memory that the process takes, with what it shares.", [("", "", str(memory[0]))])
    of_files = Family("gauge", "Of it, pages of files, such as mapped weights.", [("", "", str(memory[1]))])
    return {f"{PROCESS}resident_memory_bytes": total, f"{PROCESS}resident_memory_mapped_bytes": of_files}


def _of_keys(keys: Mapping[str, Mapping[str, int]]) -> dict[str, Family]:
    if not keys:
        return {}
    requests = Family("counter", "Requests of a key that have ended, with or without success.")
    tokens = Family("counter", "Tokens of a key, by kind: prompt, cached and generated.")
    unfinished = Family("gauge", "Requests of a key that have not ended, and how many of them are waiting.")
    for name, used in keys.items():
        key = f'key="{quoted(name)}"'
        requests.samples.append(("", key, str(used["requests"])))
        for kind, counter in KEY_TOKENS.items():
            tokens.samples.append(("", f'{key},kind="{kind}"', str(used[counter])))
        for state in ("in_flight", "waiting"):
            unfinished.samples.append(("", f'{key},state="{state}"', str(used[state])))
    return {
        "lmserve_key_requests_total": requests,
        "lmserve_key_tokens_total": tokens,
        "lmserve_key_requests_open": unfinished,
    }


def parsed(text: str) -> dict[str, Family]:
    """The metrics of a page by their names."""
    families: dict[str, Family] = {}
    for line in text.splitlines():
        if line.startswith(("# HELP ", "# TYPE ")):
            _, what, name, rest = line.split(" ", 3)
            family = families.setdefault(name, Family())
            if what == "HELP":
                family.help = rest
            else:
                family.kind = rest
        elif (sample := SAMPLE.fullmatch(line)) is not None:
            name = sample["name"]
            suffix = next((end for end in SUFFIXES if name.endswith(end) and name.removesuffix(end) in families), "")
            family = families.setdefault(name.removesuffix(suffix), Family())
            family.samples.append((suffix, sample["labels"] or "", sample["value"]))
    return families


def quoted(text: str) -> str:
    """A label's value as the format wants it."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _lines(name: str, family: Family, model: str | None) -> Iterator[str]:
    if family.help:
        yield f"# HELP {name} {family.help}"
    yield f"# TYPE {name} {family.kind}"
    label = MODEL_LABELS.get(re.split("[_:]", name)[0])
    own = [] if label is None or model is None else [f'{label}="{quoted(model)}"']
    for suffix, labels, value in family.samples:
        every = ",".join([*own, *([labels] if labels else [])])
        yield f"{name}{suffix}{{{every}}} {value}" if every else f"{name}{suffix} {value}"


def _aliases(families: Mapping[str, Family], model: str | None) -> Iterator[str]:
    for alias, name in ALIASES:
        if name in families:
            source = families[name]
            samples = source.samples
            if alias == "vllm:request_success_total":
                samples = _finished(samples)
            text = f"The same as {name}, under its name in {alias.partition(':')[0]}."
            yield from _lines(alias, Family(source.kind, text, samples), model)
    if KV_BLOCKS in families:
        blocks = {labels: float(value) for _, labels, value in families[KV_BLOCKS].samples}
        used = blocks.get('state="owned"', 0.0) / (sum(blocks.values()) or 1.0)
        for alias in KV_USE:
            share = Family("gauge", "Share of the KV blocks that running sequences own.", [("", "", f"{used:.6g}")])
            yield from _lines(alias, share, model)


def _finished(samples: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """How requests ended, in vLLM's words; it leaves out those that failed."""
    return [
        (suffix, labels.replace("outcome=", "finished_reason="), value)
        for suffix, labels, value in samples
        if labels != 'outcome="error"'
    ]
