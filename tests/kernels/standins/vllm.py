"""A stand-in for vLLM that takes what the benchmark for GPUs calls, as vLLM's documents have it (LLM, SamplingParams).

It reads the model's config.json and computes nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class SamplingParams:
    temperature: float
    max_tokens: int
    ignore_eos: bool
    detokenize: bool


@dataclass(kw_only=True)
class LLM:
    model: str
    load_format: str
    skip_tokenizer_init: bool
    enable_prefix_caching: bool
    gpu_memory_utilization: float
    max_model_len: int
    max_num_seqs: int

    def __post_init__(self) -> None:
        self.config = json.loads((Path(self.model) / "config.json").read_text())
        assert self.load_format == "dummy"
        assert self.config["architectures"] == ["LlamaForCausalLM"]

    def generate(self, prompts, sampling_params: SamplingParams, *, use_tqdm: bool) -> list[object]:
        assert not use_tqdm
        assert len(prompts) <= self.max_num_seqs
        for prompt in prompts:
            length = len(prompt["prompt_token_ids"])
            assert length + sampling_params.max_tokens <= self.max_model_len
            assert max(prompt["prompt_token_ids"]) < self.config["vocab_size"]
        return [object() for _ in prompts]
