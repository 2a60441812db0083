//! The classes of a model on the kernels and of its programs. Their methods are in `cpu.rs` and `cpu_program.rs`.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;

use crate::cpu::{Model, Program};

/// A decoder with its weights and KV cache.
#[pyclass(frozen, module = "lmserve._core")]
pub(super) struct CpuModel(pub(super) Mutex<Model>);

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A list of operations on the weights of one model. A method records one operation; values are numbers.
#[pyclass(frozen, module = "lmserve._core")]
pub(super) struct CpuProgram {
    pub(super) model: Py<CpuModel>,
    pub(super) program: Mutex<Program>,
}
