"""Names of parameters in other servers and libraries, and the nearest parameter of a route."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Final

# How alike two names must be: `temprature` is, `tools` and `models` are not.
ALIKE: Final = 0.8

# What routes here call a thing, and what others do. Names of the first list are aliases of each other too.
GROUPS: Final[Sequence[tuple[Sequence[str], Sequence[str]]]] = (
    (
        ("max_tokens", "max_output_tokens", "request_output_len"),
        (
            *("max_completion_tokens", "max_new_tokens", "max_length", "max_gen_len", "max_tokens_to_sample"),
            *("max_generated_tokens", "maxTokens", "maxOutputTokens", "n_predict", "num_predict", "output_len"),
        ),
    ),
    (
        ("repetition_penalty",),
        (
            *("repeat_penalty", "rep_pen", "repeat_last_n", "rep_pen_range", "repetition_penalty_range"),
            *("encoder_repetition_penalty", "no_repeat_ngram_size", "length_penalty", "penalty_alpha"),
            *("dry_multiplier", "dry_base", "dry_allowed_length"),
        ),
    ),
    (("presence_penalty", "repetition_penalty"), ("presencePenalty", "penalize_nl")),
    (("frequency_penalty", "repetition_penalty"), ("frequencyPenalty",)),
    (
        ("temperature",),
        ("temp", "do_sample", "greedy", "dynatemp_range", "dynatemp_exponent", "smoothing_factor", "temperature_last"),
    ),
    (("top_p",), ("topP", "typical_p", "typical", "top_a", "tfs_z", "tfs", "nucleus", "top_n_sigma")),
    (("top_k",), ("topK",)),
    (("min_p", "top_p"), ("minP", "epsilon_cutoff", "eta_cutoff", "xtc_probability", "xtc_threshold")),
    (("temperature", "top_p"), ("mirostat", "mirostat_mode", "mirostat_tau", "mirostat_eta", "samplers")),
    (("seed",), ("random_seed", "rng_seed", "sampler_seed")),
    (
        # Where a route has both, as /generate does, its `stop` cancels the turn.
        ("stop_words", "stop", "stop_sequences"),
        ("stop_strings", "stop_sequence", "stopping_strings", "stopSequences", "antiprompt", "stop_str", "until"),
    ),
    (("stop_token_ids", "stop_words", "stop"), ("eos_token_id", "stop_tokens", "custom_eos_token_ids")),
    (("ignore_eos",), ("ban_eos_token", "ignore_eos_token")),
    (("min_tokens", "min_new_tokens"), ("min_length", "min_tokens_to_generate", "min_output_tokens")),
    (("logit_bias",), ("logits_bias", "bad_words", "bad_words_ids", "allowed_token_ids", "banned_tokens")),
    (("n",), ("best_of", "num_return_sequences", "num_beams", "use_beam_search", "candidate_count", "candidateCount")),
    (("logprobs", "top_logprobs"), ("n_probs", "return_logprobs", "responseLogprobs")),
    (
        ("structured_outputs", "text", "output_config"),
        (
            *("grammar", "json_schema", "regex", "ebnf", "guided_decoding_backend", "structural_tag", "responseSchema"),
            *("response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        ),
    ),
)


def looks_like_sampling(name: str, fields: Collection[str]) -> bool:
    """Whether a key that a route with these fields does not know says how tokens are chosen, or when they end."""
    if any(name in (*own, *others) for own, others in GROUPS):
        return True
    own = {field for names, _ in GROUPS for field in names if field in fields}
    return bool(get_close_matches(name, own, n=1, cutoff=ALIKE))


def nearest(name: str, fields: Collection[str]) -> str | None:
    """The field that does what `name` does elsewhere, or is spelled like it; None: there is none."""
    for own, others in GROUPS:
        if name in (*own, *others):
            found = next((field for field in own if field in fields), None)
            if found is not None:
                return found
    alike = get_close_matches(name, fields, n=1, cutoff=ALIKE)
    return alike[0] if alike else None


def advice(name: str, fields: Collection[str]) -> str:
    """The end of a message that refuses `name`."""
    field = nearest(name, fields)
    return "" if field is None else f"; the nearest supported field is `{field}`"


def refused(fields: Collection[str]) -> str:
    """What a route with these fields, which ignores other unknown keys, says of those that it refuses."""
    names = sorted({name for own, others in GROUPS for name in (*own, *others) if name not in fields})
    listed = ", ".join(f"`{name}`" for name in names)
    return (
        "Unknown keys are ignored, except those that look like sampling parameters, which are a 400: "
        f"keys that are spelled almost like a parameter of this route, and {listed}."
    )
