//! Embedding requests: tokens in, normalised vectors out. They run between the batches of generation.

use std::ops::Range;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::admission::Admission;
use super::embed_fields::FieldNames;
use super::executor::Executor;
use crate::error::{Error, Kind, Result};
use crate::wire::{Mailbox, Usage};

/// Maximum number of inputs of one request.
pub const MAX_INPUTS: usize = 2048;

/// How vectors are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encoding {
    /// A JSON list of numbers.
    #[default]
    Float,
    /// Little-endian f32, in base64.
    Base64,
}

/// One thing to embed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EmbedInput {
    /// Text, tokenized with the model's special tokens.
    Text(String),
    /// A document, tokenized as `Text` and cut to `document_tokens`.
    Document(String),
    /// Token ids, taken as they are.
    Ids(Vec<u32>),
    /// Two texts that the model compares: a query and a document.
    Pair(String, String),
    /// Text around another text: what comes before it, the text itself, and what follows. None of them gets special tokens. A model
    /// that scores pairs by its answer is asked so.
    Framed(String, String, String),
}

/// Which end of a text is cut off if the text is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cut {
    /// Its end.
    #[default]
    End,
    /// Its beginning.
    Start,
}

/// How inputs that are too long are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Truncation {
    /// Maximum number of tokens of an input, special tokens included. Absent: the model's limit.
    #[serde(default)]
    pub to: Option<usize>,
    /// Which end is cut off. A pair is cut in its second text, a framed text in the text itself.
    #[serde(default)]
    pub cut: Cut,
}

/// An embedding request.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbedSubmission {
    /// The reply's `model`.
    pub model: String,
    /// What to embed.
    pub inputs: Vec<EmbedInput>,
    /// How vectors are written.
    #[serde(default)]
    pub encoding_format: Encoding,
    /// Number of leading dimensions to keep and to normalise again. Absent: all.
    #[serde(default)]
    pub dimensions: Option<usize>,
    /// Whether the mean of a vector is subtracted before it is cut.
    #[serde(default)]
    pub centered: bool,
    /// Absent: an input that is too long is an error.
    #[serde(default)]
    pub truncation: Option<Truncation>,
    /// Maximum number of tokens of a document, without special tokens: a pair's second text, or the text within a framed one. The
    /// rest is cut off.
    #[serde(default)]
    pub document_tokens: Option<usize>,
    /// The API key's number.
    #[serde(default)]
    pub tenant: u32,
    /// As in [`Submission`](crate::request::Submission).
    #[serde(default)]
    pub background: bool,
    /// How error messages name the fields.
    #[serde(default)]
    pub fields: FieldNames,
}

impl EmbedSubmission {
    /// Parses and bounds one JSON object.
    ///
    /// # Errors
    /// `invalid_value` (400) names the field, its limit and what was given.
    pub fn parse(json: &[u8], size: usize) -> Result<Self> {
        let submission: Self = serde_json::from_slice(json)
            .map_err(|e| Error::invalid("input", format!("malformed request: {e}")))?;
        let count = submission.inputs.len();
        if count == 0 || count > MAX_INPUTS {
            let message = format!("must have 1 to {MAX_INPUTS} entries, but {count} were given");
            return Err(submission.fields.inputs_error(&message));
        }
        if let Some(n) = submission.dimensions
            && (n == 0 || n > size)
        {
            let message = format!("must lie in [1, {size}], but {n} was given");
            return Err(submission.fields.dimensions_error(&message));
        }
        Ok(submission)
    }
}

/// The reply in OpenAI's format.
#[derive(Serialize)]
struct Embeddings<'a> {
    object: &'static str,
    data: Vec<Entry>,
    model: &'a str,
    usage: EmbedUsage,
}

#[derive(Serialize)]
struct Entry {
    object: &'static str,
    embedding: Written,
    index: usize,
}

/// A vector. Each number has as many digits as distinguish it from all other 32-bit floats.
#[derive(Serialize)]
#[serde(untagged)]
enum Written {
    Numbers(Vec<f32>),
    Text(String),
}

#[derive(Serialize)]
struct EmbedUsage {
    prompt_tokens: usize,
    total_tokens: usize,
}

fn in_base64(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

/// The reply of an embedding request. If it is dropped before it is written, because of a panic, the client gets an error.
#[derive(Debug)]
pub(super) struct EmbedReply(Arc<Mailbox>);

impl EmbedReply {
    pub(super) const fn new(mailbox: Arc<Mailbox>) -> Self {
        Self(mailbox)
    }

    fn end(self, body: &[u8]) {
        self.0.end(|out| out.extend_from_slice(body));
    }

    pub(super) fn fail(self, error: Error) {
        self.0.fail(error, true, |_, _| {});
    }
}

impl Drop for EmbedReply {
    fn drop(&mut self) {
        if self.0.is_ended() {
            return;
        }
        let message = "the server failed before the request ended";
        self.0.fail(Error::internal(message), true, |_, _| {});
        self.0.signal();
    }
}

/// How much a pass has computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Embedded {
    /// A part of a text.
    Part,
    /// Some texts. Others remain.
    Batch,
    /// The last texts.
    All,
}

/// An embedding request on the engine's thread.
#[derive(Debug)]
pub(super) struct EmbedJob {
    submission: EmbedSubmission,
    sequences: Vec<Vec<u32>>,
    size: usize,
    vectors: Vec<f32>,
    done: usize,
    /// The sequences of a pass that the model has not finished.
    begun: Option<Range<usize>>,
    // Fields are dropped in this order: the request's place is free before the client gets an error.
    open: Admission,
    reply: EmbedReply,
}

impl EmbedJob {
    pub(super) fn new(
        submission: EmbedSubmission,
        sequences: Vec<Vec<u32>>,
        size: usize,
        open: Admission,
        reply: EmbedReply,
    ) -> Self {
        Self {
            submission,
            sequences,
            size,
            vectors: Vec::new(),
            done: 0,
            begun: None,
            open,
            reply,
        }
    }

    /// Whether it was aborted.
    pub(super) fn is_aborted(&self) -> bool {
        self.open.aborted().is_some()
    }

    /// Runs one pass over the next sequences: at least one, and as many as fit into `max_tokens`.
    ///
    /// # Errors
    /// Those of the executor, and of [`Self::accept`].
    pub(super) fn run(
        &mut self,
        executor: &mut dyn Executor,
        max_tokens: usize,
    ) -> Result<Embedded> {
        let (batch, vectors) = if let Some(batch) = self.begun.take() {
            (batch, executor.go_on_embedding()?)
        } else {
            let (batch, ids, borders) = self.next_batch(max_tokens);
            (batch, executor.begin_embed(&ids, &borders)?)
        };
        let Some(vectors) = vectors else {
            self.begun = Some(batch);
            return Ok(Embedded::Part);
        };
        if self.accept(&batch, &vectors)? {
            return Ok(Embedded::All);
        }
        Ok(Embedded::Batch)
    }

    /// The next sequences as flat token ids, and the places where they begin.
    fn next_batch(&self, max_tokens: usize) -> (Range<usize>, Vec<i32>, Vec<i32>) {
        let (mut ids, mut borders) = (Vec::new(), vec![0]);
        let mut end = self.done;
        for sequence in &self.sequences[self.done..] {
            if end > self.done && ids.len() + sequence.len() > max_tokens {
                break;
            }
            ids.extend(sequence.iter().map(|&id| id as i32));
            borders.push(ids.len() as i32);
            end += 1;
        }
        (self.done..end, ids, borders)
    }

    /// Stores the vectors of a batch. Returns true if no sequence remains.
    ///
    /// # Errors
    /// `internal_error` if the model returned another number of values; `numerical_error` names an input whose values are not
    /// finite.
    fn accept(&mut self, batch: &Range<usize>, vectors: &[f32]) -> Result<bool> {
        let wanted = batch.len() * self.size;
        if vectors.len() != wanted {
            return Err(Error::internal(format!(
                "the model gave {} values for {wanted}",
                vectors.len()
            )));
        }
        let mut texts = batch.clone().zip(vectors.chunks_exact(self.size));
        if let Some((at, _)) = texts.find(|(_, vector)| vector.iter().any(|x| !x.is_finite())) {
            let (_, place) = self.submission.fields.place(at);
            let message = format!(
                "the embedding of {place} is not finite: a weight of the model is not a number, or its values \
                 overflow their type"
            );
            return Err(Error::new(Kind::Internal, "numerical_error", message));
        }
        self.vectors.extend_from_slice(vectors);
        self.done = batch.end;
        Ok(self.done == self.sequences.len())
    }

    /// Records that its computation begins.
    pub(super) fn start(&mut self) {
        self.open.start();
    }

    /// Writes the reply.
    pub(super) fn finish(mut self) {
        let kept = self.submission.dimensions.unwrap_or(self.size);
        let tokens: usize = self.sequences.iter().map(Vec::len).sum();
        let vectors = self.vectors.chunks_exact(self.size);
        let data = vectors.enumerate().map(|(index, vector)| {
            let mut vector = vector.to_vec();
            if kept < self.size {
                if self.submission.centered {
                    center(&mut vector);
                }
                vector.truncate(kept);
                normalize(&mut vector);
            }
            Entry {
                object: "embedding",
                embedding: match self.submission.encoding_format {
                    Encoding::Float => Written::Numbers(vector),
                    Encoding::Base64 => Written::Text(in_base64(&vector)),
                },
                index,
            }
        });
        let reply = Embeddings {
            object: "list",
            data: data.collect(),
            model: &self.submission.model,
            usage: EmbedUsage {
                prompt_tokens: tokens,
                total_tokens: tokens,
            },
        };
        let body = serde_json::to_vec(&reply);
        self.open.count(
            0,
            Usage {
                prompt_tokens: tokens,
                ..Usage::default()
            },
        );
        drop(self.open);
        match body {
            Ok(body) => self.reply.end(&body),
            Err(error) => self
                .reply
                .fail(Error::internal(format!("the reply is no JSON: {error}"))),
        }
    }

    /// Ends the request with an error.
    pub(super) fn fail(self, error: Error) {
        drop(self.open);
        self.reply.fail(error);
    }
}

/// Subtracts the mean. If the vector is normalised afterwards, this equals a layer norm without weights.
fn center(vector: &mut [f32]) {
    let sum: f64 = vector.iter().copied().map(f64::from).sum();
    let mean = sum / vector.len().max(1) as f64;
    for value in vector {
        *value = (f64::from(*value) - mean) as f32;
    }
}

fn normalize(vector: &mut [f32]) {
    let norm = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
    if norm > 0.0 {
        for value in vector {
            *value /= norm;
        }
    }
}
