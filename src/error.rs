//! The one error type of the crate.

use std::path::{Path, PathBuf};

/// What went wrong, with the offending value in backticks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A slice, a shape or a pair of lengths does not fit.
    #[error("{what} has shape `{got}`, expected {want}")]
    Shape {
        /// The argument at fault.
        what: &'static str,
        /// Its shape or length.
        got: String,
        /// What would have been right.
        want: String,
    },
    /// An argument is out of its range.
    #[error("{name} is `{value}`: {reason}")]
    Argument {
        /// The argument at fault.
        name: &'static str,
        /// Its value.
        value: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// The input holds a NaN or an infinity.
    #[error("{what} holds the non-finite value `{value}` in row `{row}`, column `{col}`")]
    NonFinite {
        /// The matrix at fault.
        what: String,
        /// The first row that holds a non-finite value.
        row: usize,
        /// Its first non-finite column.
        col: usize,
        /// The value.
        value: f32,
    },
    /// A row of a batch has no token left after masking.
    #[error("mask leaves no token in row `{0}`")]
    AllMasked(usize),
    /// A probe was given labels of one class.
    #[error("y holds the one class `{0}`: a probe needs two")]
    OneClass(u8),
    /// A file is not what its name says.
    #[error("`{path}` is not a valid safetensors file: {reason}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor of a file cannot be used as asked.
    #[error("tensor `{name}`: {reason}")]
    Tensor {
        /// The tensor.
        name: String,
        /// Why.
        reason: String,
    },
    /// A file or folder that was to be changed cannot be.
    #[error("`{path}`: {reason}")]
    Target {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The operating system refused.
    #[error("`{path}`: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
    /// The caller asked the computation to stop.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    pub(crate) fn argument(
        name: &'static str,
        value: impl ToString,
        reason: impl Into<String>,
    ) -> Self {
        Error::Argument {
            name,
            value: value.to_string(),
            reason: reason.into(),
        }
    }

    pub(crate) fn shape(
        what: &'static str,
        got: impl std::fmt::Debug,
        want: impl Into<String>,
    ) -> Self {
        Error::Shape {
            what,
            got: format!("{got:?}"),
            want: want.into(),
        }
    }

    pub(crate) fn format(path: &Path, reason: impl Into<String>) -> Self {
        Error::Format {
            path: path.to_path_buf(),
            reason: reason.into(),
        }
    }

    pub(crate) fn tensor(name: &str, reason: impl Into<String>) -> Self {
        Error::Tensor {
            name: name.to_string(),
            reason: reason.into(),
        }
    }

    pub(crate) fn target(path: &Path, reason: impl Into<String>) -> Self {
        Error::Target {
            path: path.to_path_buf(),
            reason: reason.into(),
        }
    }

    /// For `map_err` on file operations.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
        move |source| Error::Io {
            path: path.to_path_buf(),
            source,
        }
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
