"""A model's plan as lines for a person, for `lmserve plan` and for the start of `lmserve serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lmserve.config import format_size

if TYPE_CHECKING:
    from lmserve.engine.load import ModelPlan
    from lmserve.engine.tiers import TierPlan
    from lmserve.model.options import MemoryPlan

LENGTHS: Final = (512, 2048, 4096)  # tokens of a session, beside the longest that there can be


def _weights(memory: MemoryPlan) -> str:
    """Where they are, and what that takes."""
    cache = memory.weights_cache
    if cache is None:
        return "packed at every start, into memory of this process"
    if cache.is_there:
        return f"mapped from {cache.path}: processes share them, and the system may drop them and read them again"
    mapped = " and maps them from there itself" if cache.maps else ""
    size = format_size(memory.weight_bytes)
    return f"packed at the first start, which writes {size} to {cache.path} for later starts{mapped}"


def plan_lines(plan: ModelPlan, names: tuple[str, ...]) -> list[str]:
    """The plan for a person, a line each. `names`: those the model is served under."""
    from lmserve.model.device import available_memory
    from lmserve.model.rope import original_length

    memory = plan.memory
    also = f" (also as {', '.join(names[1:])})" if len(names) > 1 else ""
    weights = format_size(memory.weight_bytes)
    kernels = "cpu kernels" if memory.ops == "cpu" else memory.dtype
    if memory.ops == "cpu" or memory.packed:
        weights += f" ({memory.quantize or 'as stored'})"
    lines = [
        f"Model     {names[0]}{also}, from {plan.checkpoint.path}",
        f"Device    {memory.device}, {kernels}, weights {weights}, context {memory.max_model_len} tokens",
    ]
    if memory.ranks > 1:
        lines.append(f"Ranks     {memory.ranks} processes; weights, KV cache and states are those of each")
    if memory.ops == "cpu":
        lines.append(f"Weights   {_weights(memory)}")
    if memory.weights_are_mapped and memory.weight_bytes > (free := available_memory()):
        short = f"the weights do not fit into {format_size(free)} of free memory"
        lines.append(f"Note      {short}: each step reads from the disk, which is slow")
    lines += [f"Note      {note}" for note in plan.checkpoint.notes]
    if original := original_length(plan.checkpoint.config.attention, memory.max_model_len):
        short = f"--max-model-len {original} chooses the short ones, as transformers does for short sequences"
        lines.append(f"Note      longrope: every sequence has the factors for more than {original} tokens; {short}")
    if plan.checkpoint.kind == "generate":
        defaults = f"{plan.defaults} ({plan.defaults.source})" if plan.defaults.given() else "temperature 1"
        lines.append(f"Sampling  defaults for requests that set none: {defaults}")
    if memory.num_blocks:
        tokens = memory.num_blocks * memory.block_size
        blocks = f"{memory.num_blocks} blocks of {memory.block_size} tokens"
        each = f"{format_size(memory.kv_bytes_per_token)} a token"
        if memory.num_window_blocks:
            each += f" in layers that see all of it, and {format_size(memory.window_bytes_per_token)} in others"
        lines.append(f"KV cache  {blocks}: {tokens} tokens, {each}, {format_size(memory.kv_bytes)} in all")
        lengths = [length for length in LENGTHS if length < memory.max_model_len] + [memory.max_model_len]
        held = [memory.sequences_that_fit(length) for length in lengths]
        if memory.state_slots:
            # A session is kept by one snapshot.
            held = [min(count, memory.state_slots) for count in held]
        fit = [f"{count} of {length} tokens" for count, length in zip(held, lengths, strict=True)]
        lines.append(f"Sessions  {', or '.join(fit)} fit into the KV cache")
    if memory.num_window_blocks:
        own = memory.sequence_window_blocks * memory.block_size
        blocks = f"{memory.num_window_blocks} blocks; a running sequence holds its last {own} tokens there"
        lines.append(f"Windows   {memory.window} tokens, in {blocks}")
    if memory.state_slots:
        each, total = format_size(memory.state_bytes), format_size(memory.states_bytes)
        kept = f"a snapshot where a turn ends and every {plan.state_every} tokens"
        lines.append(f"States    {memory.state_slots} slots, {each} each, {total} in all: {kept}")
    if plan.given:
        rank = max(adapter.rank for adapter in plan.given.values())
        size = format_size(memory.adapter_bytes)
        lines.append(f"Adapters  {len(plan.given)}, of rank {rank} at most, {size} in all: {', '.join(plan.given)}")
    lines += _tier_lines(plan.tiers)
    speculate = memory.speculate
    graphs = "" if memory.device == "cpu" else "; a step with drafts replays no CUDA graph"
    rows = f"{memory.max_rows} sampled rows a step with them"
    if memory.mtp:
        more = f", or up to {speculate} from the text" if speculate else ""
        lines.append(f"Drafts    one token of a sequence by the model's own head{more}, {rows}")
    elif speculate:
        lines.append(f"Drafts    up to {speculate} tokens of a sequence, {rows}{graphs}")
    return lines


def _tier_lines(tiers: TierPlan) -> list[str]:
    kept = [
        f"{format_size(size)} of host memory for {what}"
        for size, what in ((tiers.host_blocks, "KV blocks"), (tiers.host_states, "states"))
        if size
    ]
    if tiers.folder is not None:
        kept.append(f"{format_size(tiers.disk)} of disk in {tiers.folder}")
    return [f"Below     {', '.join(kept)}"] if kept else []
