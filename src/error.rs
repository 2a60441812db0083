//! The one error type of the core. Its message says what went wrong, the limit, and what was given. Its kind decides the
//! HTTP status that a client sees, so that no layer above has to guess.

use serde_json::{Map, Value};

/// What a failure means to the client; each kind has exactly one HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 400: the request can never succeed as it was sent.
    Invalid,
    /// 404: the model, session or route does not exist.
    NotFound,
    /// 409: the session is already running a turn; retry after it.
    Conflict,
    /// 429: the queue is full or a quota is spent; retry later.
    Busy,
    /// 503: the engine is loading, draining or down.
    Unavailable,
    /// 507: the disk has no room; retry once it has.
    StorageFull,
    /// 500: a fault of the server (a model step raised, a file could not be written).
    Internal,
}

impl Kind {
    /// HTTP status code.
    pub const fn status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::NotFound => 404,
            Self::Conflict => 409,
            Self::Busy => 429,
            Self::Unavailable => 503,
            Self::StorageFull => 507,
            Self::Internal => 500,
        }
    }

    /// `error.type` of OpenAI's error object.
    pub const fn type_name(self) -> &'static str {
        match self {
            Self::Invalid | Self::NotFound => "invalid_request_error",
            Self::Conflict => "conflict_error",
            Self::Busy => "rate_limit_error",
            Self::Unavailable => "service_unavailable_error",
            Self::StorageFull | Self::Internal => "server_error",
        }
    }
}

/// An error with everything its HTTP form needs.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Decides status and type.
    pub kind: Kind,
    /// Machine-readable reason, such as `context_length_exceeded`.
    pub code: &'static str,
    /// What, the limit, and what was given.
    pub message: String,
    /// The request field at fault, if there is one.
    pub param: Option<String>,
    /// Numbers that a client can use (`context_length`, `retry_after`, ...), merged into the error object.
    pub details: Box<Map<String, Value>>,
}

/// Result of the core.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` with a stable `code`.
    pub fn new(kind: Kind, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            kind,
            code,
            message: message.into(),
            param: None,
            details: Box::default(),
        }
    }

    /// 400 `invalid_value` that names the field at fault.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, "invalid_value", message).with_param(param)
    }

    /// 500 `internal_error`.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, "internal_error", message)
    }

    /// Names the request field at fault.
    #[must_use]
    pub fn with_param(mut self, param: &str) -> Self {
        self.param = Some(param.to_owned());
        self
    }

    /// Adds one number or word that a client can use.
    #[must_use]
    pub fn with_detail(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.details.insert(key.to_owned(), value.into());
        self
    }

    /// `{"message","type","param","code", ...details}`: the object under `error` on every route.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut object = Map::new();
        object.insert("message".into(), self.message.clone().into());
        object.insert("type".into(), self.kind.type_name().into());
        object.insert("param".into(), self.param.clone().into());
        object.insert("code".into(), self.code.into());
        object.extend((*self.details).clone());
        object
    }
}
