//! The read-only memory map of a file.

use std::fs::File;
use std::path::Path;

use crate::error::{Error, Result};

/// Maps `path` for reading.
pub(crate) fn open(path: &Path) -> Result<memmap2::Mmap> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: the map is read-only and private to this process's view of the file. Another process
    // that truncates the file while it is mapped makes reads fault (SIGBUS), as for any mapped file;
    // stores are written beside their final name and renamed into place, so ours never change.
    unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))
}
