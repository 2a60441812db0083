//! The formats of thoughts.

use super::ThoughtFormat;
use super::tools::HARMONY_MESSAGES;

/// All formats of thoughts. If a template matches several, the first is used.
pub const THOUGHT_FORMATS: [&ThoughtFormat; 6] = [
    &HARMONY_THOUGHTS,
    &GEMMA4_THOUGHTS,
    &MISTRAL_THOUGHTS,
    &SEED_THOUGHTS,
    &COMMAND_THOUGHTS,
    &THINK,
];

/// `DeepSeek` R1, Qwen 3, GLM, `MiniMax`, Kimi, Granite 3, LFM 2.5 and most others (their chat templates).
pub const THINK: ThoughtFormat = ThoughtFormat {
    name: "think",
    templates: &[&["<think>"], &["</think>"]],
    open: "<think>",
    close: "</think>",
    answer: "",
    around: &[],
    messages: None,
    tokens: &["<think>", "</think>"],
};

/// Magistral and Ministral 3 (template of `Ministral-3-14B-Reasoning-2512`).
pub const MISTRAL_THOUGHTS: ThoughtFormat = ThoughtFormat {
    name: "mistral",
    templates: &[&["[THINK]", "[/THINK]"]],
    open: "[THINK]",
    close: "[/THINK]",
    answer: "",
    around: &[],
    messages: None,
    tokens: &["[THINK]", "[/THINK]"],
};

/// Gemma 4 (template of `gemma-4-31B-it`).
pub const GEMMA4_THOUGHTS: ThoughtFormat = ThoughtFormat {
    name: "gemma4",
    templates: &[&["<|channel>thought", "<channel|>"]],
    open: "<|channel>thought\n",
    close: "<channel|>",
    answer: "",
    around: &[],
    messages: None,
    tokens: &["<|channel>", "<channel|>"],
};

/// gpt-oss (`OpenAI`'s harmony response format, "Message format").
pub const HARMONY_THOUGHTS: ThoughtFormat = ThoughtFormat {
    name: "harmony",
    templates: &[&["<|channel|>analysis<|message|>"]],
    open: "<|channel|>analysis<|message|>",
    close: "<|end|><|start|>assistant",
    answer: "<|channel|>final<|message|>",
    around: &[],
    messages: Some(&HARMONY_MESSAGES),
    tokens: &["<|channel|>", "<|message|>", "<|end|>", "<|start|>"],
};

/// Seed-OSS (template of `Seed-OSS-36B-Instruct`).
pub const SEED_THOUGHTS: ThoughtFormat = ThoughtFormat {
    name: "seed",
    templates: &[&["<seed:think>"]],
    open: "<seed:think>",
    close: "</seed:think>",
    answer: "",
    around: &[],
    messages: None,
    tokens: &["<seed:think>", "</seed:think>"],
};

/// Command R7B, Command A and North (template of `c4ai-command-r7b-12-2024`), whose answers have markers around their words.
pub const COMMAND_THOUGHTS: ThoughtFormat = ThoughtFormat {
    name: "command",
    templates: &[&["<|START_THINKING|>"]],
    open: "<|START_THINKING|>",
    close: "<|END_THINKING|>",
    answer: "",
    around: &[
        "<|START_RESPONSE|>",
        "<|END_RESPONSE|>",
        "<|START_TEXT|>",
        "<|END_TEXT|>",
    ],
    messages: None,
    tokens: &["<|START_THINKING|>", "<|END_THINKING|>"],
};
