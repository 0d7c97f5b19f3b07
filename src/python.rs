//! The Python module `nest_rs._core`: a thin, typed surface over the crate.
//!
//! Arrays come in without a copy, f16 and bf16 as `uint16` views with a dtype tag (NumPy has no
//! bfloat16). Long calls release the GIL; the calling thread only watches for signals, so that
//! Ctrl-C is seen at once.

mod array;
mod checkpoint;
mod cluster;
mod patch;
mod probe;
mod stats;
mod store;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;
use crate::{Workers, active_isa};

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        match &error {
            Error::Io { path, source } => {
                let text = source.to_string();
                let (code, path) = (source.raw_os_error(), path.display().to_string());
                // With an error number, Python picks FileNotFoundError, PermissionError, ...
                match code {
                    Some(code) => PyOSError::new_err((code, strip_code(&text), path)),
                    None => PyOSError::new_err(error.to_string()),
                }
            }
            Error::Interrupted => PyKeyboardInterrupt::new_err(()),
            _ => PyValueError::new_err(error.to_string()),
        }
    }
}

/// The system's text without Rust's ` (os error 2)`, which Python writes its own way.
fn strip_code(text: &str) -> String {
    text.split(" (os error").next().unwrap_or(text).to_string()
}

/// Runs `work` on a thread of its own without the GIL, while this thread watches for signals.
fn run<T: Send>(
    py: Python<'_>,
    n_threads: Option<usize>,
    work: impl FnOnce(&Workers) -> crate::Result<T> + Send,
) -> PyResult<T> {
    let workers = Workers::new(n_threads)?;
    let cancel = AtomicBool::new(false);
    let mut signal: PyResult<()> = Ok(());
    let result = py.detach(|| {
        std::thread::scope(|scope| {
            let (done, finished) = channel();
            let cancel = &cancel;
            let thread = std::thread::Builder::new()
                .name("nest-rs-call".to_string())
                .spawn_scoped(scope, move || {
                    let result = work(&workers.with_cancel(cancel));
                    // The receiver outlives this thread.
                    let _ = done.send(());
                    result
                });
            let Ok(thread) = thread else {
                return Err(PyRuntimeError::new_err("the system gave no thread"));
            };
            while finished.recv_timeout(Duration::from_millis(50)) == Err(RecvTimeoutError::Timeout)
            {
                if signal.is_ok() {
                    signal = Python::attach(|py| py.check_signals());
                    if signal.is_err() {
                        cancel.store(true, Ordering::Relaxed);
                    }
                }
            }
            match thread.join() {
                Ok(result) => Ok(result),
                Err(_) => Err(PyRuntimeError::new_err(
                    "internal error: a worker stopped; please report it",
                )),
            }
        })
    })?;
    signal?;
    Ok(result?)
}

/// The instruction set in use.
#[pyfunction]
fn isa() -> PyResult<&'static str> {
    crate::kernel::check_isa()?;
    Ok(active_isa().name())
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(isa, module)?)?;
    cluster::add(module)?;
    probe::add(module)?;
    stats::add(module)?;
    store::add(module)?;
    checkpoint::add(module)?;
    patch::add(module)
}
