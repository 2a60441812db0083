//! The only place that knows pyo3: classes of `lmserve._core` and the one mapping from [`crate::error::Error`] to Python.

mod bus_error;
mod cpu;
mod cpu_arrays;
mod cpu_classes;
mod cpu_executor;
mod cpu_experts;
mod cpu_program;
mod cpu_shape;
mod cpu_weights;
mod engine;
mod event;
mod executor;
mod masks;
mod scheduler;
mod session_id;
mod session_log;
mod session_state;
mod session_store;
mod simulation;
mod step_buffers;
mod stream;
mod text;
mod tiers;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use crate::error::Error;

static ERROR_CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Python::attach(
            |py| match ERROR_CLASS.import(py, "lmserve.errors", "LmserveError") {
                Ok(class) => {
                    let object = serde_json::Value::Object(error.to_json()).to_string();
                    class
                        .call_method1("from_core", (error.kind.status(), object))
                        .map_or_else(|e| e, PyErr::from_value)
                }
                Err(e) => e,
            },
        )
    }
}

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::bus_error::explain_bus_errors;
    #[pymodule_export]
    use super::cpu::{CpuTexts, cpu_isa};
    #[pymodule_export]
    use super::cpu_arrays::CpuArrays;
    #[pymodule_export]
    use super::cpu_classes::{CpuModel, CpuProgram};
    #[pymodule_export]
    use super::cpu_shape::cpu_kv_bytes_per_token;
    #[pymodule_export]
    use super::cpu_weights::{cpu_linear_bytes, encode_blocks, packed_made_of};
    #[pymodule_export]
    use super::engine::Engine;
    #[pymodule_export]
    use super::event::{Event, TokenUsage};
    #[pymodule_export]
    use super::masks::StepMasks;
    #[pymodule_export]
    use super::scheduler::Scheduler;
    #[pymodule_export]
    use super::session_log::{OpenSessionLog, check_session_log, repair_session_log};
    #[pymodule_export]
    use super::simulation::{capacity, simulate};
    #[pymodule_export]
    use super::stream::Stream;
    #[pymodule_export]
    use super::text::{ChatTemplate, GgufFile, StreamDecoder, Tokenizer};

    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_export]
    const ENTRY_TOKENS: usize = crate::sched::ENTRY_TOKENS;

    #[pymodule_export]
    const END_OF_TURN: &[&str] = crate::text::END_OF_TURN;
}
