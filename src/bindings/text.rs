//! `_core.GgufFile`, `_core.Tokenizer`, `_core.ChatTemplate` and `_core.StreamDecoder`.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use serde_json::{Map, Value};

use crate::error::{Error, Kind, Result};
use crate::gguf;
use crate::text::{self, Detokenizer, Ending, StopMatcher, Tail, without_notes};

/// Arrays longer than this are left out of `GgufFile.metadata()`.
const MAX_LISTED: usize = 64;

#[pyclass(frozen, module = "lmserve._core")]
pub(super) struct GgufFile(gguf::GgufFile);

#[pymethods]
impl GgufFile {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> Result<Self> {
        py.detach(move || gguf::GgufFile::open(&path)).map(Self)
    }

    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (key, value) in self.0.metadata() {
            if !matches!(value, gguf::Metadata::Array(array) if array.len() > MAX_LISTED) {
                dict.set_item(key, metadata_object(py, value)?)?;
            }
        }
        Ok(dict)
    }

    fn get<'py>(&self, py: Python<'py>, key: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.0
            .get(key)
            .map(|value| metadata_object(py, value))
            .transpose()
    }

    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let mut tensors = Vec::new();
        for tensor in self.0.tensors() {
            let shape = pyo3::types::PyTuple::new(py, &tensor.shape)?;
            tensors.push((
                &tensor.name,
                tensor.tensor_type.name(),
                shape,
                tensor.offset,
                tensor.bytes,
            ));
        }
        tensors.into_pyobject(py)
    }

    #[getter]
    fn data_offset(&self) -> u64 {
        self.0.data_offset()
    }
}

fn metadata_object<'py>(py: Python<'py>, value: &gguf::Metadata) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        gguf::Metadata::Unsigned(n) => n.into_pyobject(py)?.into_any(),
        gguf::Metadata::Signed(n) => n.into_pyobject(py)?.into_any(),
        gguf::Metadata::Float(x) => x.into_pyobject(py)?.into_any(),
        gguf::Metadata::Bool(flag) => flag.into_pyobject(py)?.to_owned().into_any(),
        gguf::Metadata::String(text) => text.into_pyobject(py)?.into_any(),
        gguf::Metadata::Array(array) => array_object(py, array)?,
    })
}

fn array_object<'py>(py: Python<'py>, array: &gguf::Array) -> PyResult<Bound<'py, PyAny>> {
    use gguf::Array;
    match array {
        // A list of numbers, where pyo3 would make `bytes`.
        Array::U8(items) => items
            .iter()
            .map(|&n| u32::from(n))
            .collect::<Vec<_>>()
            .into_pyobject(py),
        Array::I8(items) => items.into_pyobject(py),
        Array::U16(items) => items.into_pyobject(py),
        Array::I16(items) => items.into_pyobject(py),
        Array::U32(items) => items.into_pyobject(py),
        Array::I32(items) => items.into_pyobject(py),
        Array::F32(items) => items.into_pyobject(py),
        Array::Bool(items) => items.into_pyobject(py),
        Array::String(items) => items.into_pyobject(py),
        Array::U64(items) => items.into_pyobject(py),
        Array::I64(items) => items.into_pyobject(py),
        Array::F64(items) => items.into_pyobject(py),
        Array::Array(items) => items
            .iter()
            .map(|item| array_object(py, item))
            .collect::<PyResult<Vec<_>>>()?
            .into_pyobject(py),
    }
}

#[pyclass(frozen, module = "lmserve._core")]
pub(crate) struct Tokenizer {
    pub(crate) inner: Arc<text::Tokenizer>,
    /// What is tokenized through this object is not waited for any more.
    abandoned: AtomicBool,
}

impl Tokenizer {
    fn new(inner: text::Tokenizer) -> Self {
        Self {
            inner: Arc::new(inner),
            abandoned: AtomicBool::new(false),
        }
    }

    fn still_wanted(&self) -> Result<()> {
        if self.abandoned.load(Ordering::Relaxed) {
            let message = "the server is shutting down and does not tokenize any more";
            return Err(Error::new(Kind::Unavailable, "draining", message));
        }
        Ok(())
    }
}

#[pymethods]
impl Tokenizer {
    #[staticmethod]
    fn from_json(py: Python<'_>, json: &[u8]) -> Result<Self> {
        py.detach(|| text::Tokenizer::from_json(json))
            .map(Self::new)
    }

    #[staticmethod]
    fn from_gguf(py: Python<'_>, file: &GgufFile) -> Result<Self> {
        py.detach(|| text::Tokenizer::from_gguf(&file.0))
            .map(Self::new)
    }

    #[pyo3(signature = (text, *, add_special = false, piece_bytes = text::PIECE_BYTES))]
    fn encode(
        &self,
        py: Python<'_>,
        text: &str,
        add_special: bool,
        piece_bytes: usize,
    ) -> Result<Vec<u32>> {
        let watch = |_| self.still_wanted();
        py.detach(|| {
            self.inner
                .encode_watched(text, add_special, piece_bytes, &watch)
        })
    }

    #[pyo3(signature = (text, *, piece_bytes = text::PIECE_BYTES))]
    fn encode_rendered(&self, py: Python<'_>, text: &str, piece_bytes: usize) -> Result<Vec<u32>> {
        let watch = |_| self.still_wanted();
        py.detach(|| self.inner.encode_rendered(text, false, piece_bytes, &watch))
    }

    #[pyo3(signature = (text, *, piece_bytes = text::PIECE_BYTES))]
    fn encode_continued(&self, py: Python<'_>, text: &str, piece_bytes: usize) -> Result<Vec<u32>> {
        let watch = |_| self.still_wanted();
        py.detach(|| {
            self.inner
                .encode_continued_watched(text, piece_bytes, &watch)
        })
    }

    fn least_tokens(&self, text: &str) -> usize {
        self.inner.least_tokens(text)
    }

    #[getter]
    fn works_in_pieces(&self) -> bool {
        self.inner.works_in_pieces()
    }

    fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    #[pyo3(signature = (tokens, *, skip_special = true))]
    fn decode(&self, py: Python<'_>, tokens: Vec<u32>, skip_special: bool) -> String {
        py.detach(move || self.inner.decode(&tokens, skip_special))
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    fn is_special(&self, token: u32) -> bool {
        self.inner.is_special(token)
    }

    fn token_bytes<'py>(&self, py: Python<'py>, token: u32) -> Option<Bound<'py, PyBytes>> {
        self.inner
            .token_bytes(token)
            .map(|bytes| PyBytes::new(py, bytes))
    }
}

#[pyclass(frozen, module = "lmserve._core")]
pub(crate) struct ChatTemplate(pub(crate) Arc<text::ChatTemplate>);

#[pymethods]
impl ChatTemplate {
    #[new]
    #[pyo3(signature = (source, special_tokens = None, *, tool_source = None, tool_parser = "auto", reasoning_parser = "auto", escaped = None))]
    fn new(
        source: &str,
        special_tokens: Option<&[u8]>,
        tool_source: Option<&str>,
        tool_parser: &str,
        reasoning_parser: &str,
        escaped: Option<PyRef<'_, Tokenizer>>,
    ) -> Result<Self> {
        let mut template =
            text::ChatTemplate::new(source, &object("special_tokens", special_tokens)?)?;
        if let Some(source) = tool_source {
            template = template.with_tool_template(source)?;
        }
        if let Some(tokenizer) = escaped {
            template = template.with_escaped(text::SpecialTexts::of(&tokenizer.inner)?);
        }
        template
            .with_parsers(tool_parser, reasoning_parser)
            .map(|inner| Self(Arc::new(inner)))
    }

    #[getter]
    fn source(&self) -> String {
        self.0.source()
    }

    #[getter]
    fn variables(&self) -> Vec<String> {
        self.0.variables()
    }

    #[getter]
    fn thinks(&self) -> bool {
        self.0.thinks()
    }

    #[pyo3(signature = (messages, *, tools = None, add_generation_prompt = true, continue_final_message = false, kwargs = None))]
    fn render(
        &self,
        py: Python<'_>,
        messages: &[u8],
        tools: Option<&[u8]>,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: Option<&[u8]>,
    ) -> Result<String> {
        let ending = ending(add_generation_prompt, continue_final_message);
        py.detach(|| {
            let (messages, tools) = (list("messages", messages)?, tools_list(tools)?);
            self.0.render(
                &messages,
                tools.as_deref(),
                ending,
                &object("kwargs", kwargs)?,
            )
        })
    }

    #[pyo3(signature = (messages, *, tools = None, add_generation_prompt = true, continue_final_message = false, kwargs = None))]
    fn render_prompt(
        &self,
        py: Python<'_>,
        messages: &[u8],
        tools: Option<&[u8]>,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: Option<&[u8]>,
    ) -> Result<String> {
        let ending = ending(add_generation_prompt, continue_final_message);
        py.detach(|| {
            let (mut messages, mut tools) = (list("messages", messages)?, tools_list(tools)?);
            if !self.0.knows_tools() {
                let given = tools.take().unwrap_or_default();
                messages = self.0.without_tools(&messages, &given, true);
            }
            if !self.0.knows_notes() {
                messages = without_notes(&messages, true);
            }
            let kwargs = object("kwargs", kwargs)?;
            self.0.render(&messages, tools.as_deref(), ending, &kwargs)
        })
    }

    #[pyo3(signature = (messages, *, open_assistant, called = None, tools = None, add_generation_prompt = true, continue_final_message = false, kwargs = None))]
    #[expect(
        clippy::too_many_arguments,
        reason = "keyword arguments of the Python method"
    )]
    fn render_continued(
        &self,
        py: Python<'_>,
        messages: &[u8],
        open_assistant: bool,
        called: Option<Vec<String>>,
        tools: Option<&[u8]>,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: Option<&[u8]>,
    ) -> Result<String> {
        let ending = ending(add_generation_prompt, continue_final_message);
        let tail = if open_assistant {
            Tail::OpenAssistant
        } else {
            Tail::Closed
        };
        py.detach(|| {
            let (messages, tools) = (list("messages", messages)?, tools_list(tools)?);
            self.0.render_continued(
                tail,
                &messages,
                &called.unwrap_or_default(),
                tools.as_deref(),
                ending,
                &object("kwargs", kwargs)?,
            )
        })
    }

    #[getter]
    fn tool_format(&self) -> &'static str {
        self.0.tool_format().name
    }

    #[getter]
    fn thought_format(&self) -> Option<&'static str> {
        self.0.thought_format().map(|format| format.name)
    }

    #[pyo3(signature = (messages, *, tools = None, kwargs = None))]
    fn system_prefix(
        &self,
        py: Python<'_>,
        messages: &[u8],
        tools: Option<&[u8]>,
        kwargs: Option<&[u8]>,
    ) -> Result<Option<String>> {
        py.detach(|| {
            let (messages, tools) = (list("messages", messages)?, tools_list(tools)?);
            Ok(self
                .0
                .system_prefix(&messages, tools.as_deref(), &object("kwargs", kwargs)?))
        })
    }
}

fn ending(add_generation_prompt: bool, continue_final_message: bool) -> Ending {
    match (continue_final_message, add_generation_prompt) {
        (true, _) => Ending::OpenMessage,
        (false, true) => Ending::Answer,
        (false, false) => Ending::Closed,
    }
}

fn list(param: &str, json: &[u8]) -> Result<Vec<Value>> {
    serde_json::from_slice(json)
        .map_err(|e| Error::invalid(param, format!("{param} must be a JSON list: {e}")))
}

fn tools_list(json: Option<&[u8]>) -> Result<Option<Vec<Value>>> {
    json.map(|json| list("tools", json)).transpose()
}

fn object(param: &str, json: Option<&[u8]>) -> Result<Map<String, Value>> {
    let Some(json) = json else {
        return Ok(Map::new());
    };
    serde_json::from_slice(json)
        .map_err(|e| Error::invalid(param, format!("{param} must be a JSON object: {e}")))
}

#[pyclass(frozen, module = "lmserve._core")]
pub(super) struct StreamDecoder {
    tokenizer: Py<Tokenizer>,
    state: Mutex<(Detokenizer, StopMatcher)>,
}

#[pymethods]
impl StreamDecoder {
    #[new]
    #[pyo3(signature = (tokenizer, *, stop = None, include_stop = false, skip_special = true))]
    fn new(
        tokenizer: Py<Tokenizer>,
        stop: Option<Vec<String>>,
        include_stop: bool,
        skip_special: bool,
    ) -> Self {
        let state = (
            Detokenizer::new(skip_special),
            StopMatcher::new(&stop.unwrap_or_default(), include_stop),
        );
        Self {
            tokenizer,
            state: Mutex::new(state),
        }
    }

    fn push(&self, token: u32) -> (String, bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (detokenizer, matcher) = &mut *state;
        let matched = matcher.push(detokenizer.push(&self.tokenizer.get().inner, token));
        (matched.emit, matched.stopped)
    }

    fn flush(&self) -> (String, bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (detokenizer, matcher) = &mut *state;
        let matched = matcher.push(&detokenizer.flush(&self.tokenizer.get().inner));
        (matched.emit + &matcher.flush(), matched.stopped)
    }
}
