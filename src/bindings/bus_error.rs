//! What a process says before a bus error ends it.

use pyo3::prelude::*;

const MESSAGE: &[u8] = b"lmserve: the server ends by SIGBUS: a file that it has mapped was cut, or its disk failed. \
Weights are mapped from the model's file, or from the file of packed weights beside it; do not change either while a server runs.\n";

extern "C" fn explain(signal: libc::c_int) {
    // SAFETY: write and signal may be called from a handler of a signal; the message is static.
    unsafe {
        libc::write(libc::STDERR_FILENO, MESSAGE.as_ptr().cast(), MESSAGE.len());
        // The access that failed is made again when the handler returns, and then ends the process as it would have.
        libc::signal(signal, libc::SIG_DFL);
    }
}

/// Lets a bus error of this process say on standard error what it means, before it ends the process.
#[pyfunction]
pub(super) fn explain_bus_errors() {
    // SAFETY: the handler does only what a handler may do.
    unsafe { libc::signal(libc::SIGBUS, explain as *const () as libc::sighandler_t) };
}
