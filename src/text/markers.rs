//! Tokens that end an answer, by their text.

/// The tokens with which chat models end a turn or a document. A file may mark such a token as ordinary text. It ends a turn all
/// the same.
///
/// Reference: `special_eog_ids` in `llama-vocab.cpp` of <https://github.com/ggml-org/llama.cpp>.
pub const END_OF_TURN: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
    "<|END_OF_TURN_TOKEN|>",
    "<|eot|>",
    "<|end_of_turn|>",
    "[|endofturn|]",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
];
