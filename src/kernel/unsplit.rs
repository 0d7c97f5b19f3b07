//! In place of `split` on processors that have no tiles.

use std::ops::Range;

use super::tile::{Rows, Scratch};
use crate::error::Result;
use crate::pool::Workers;

/// None such.
pub(crate) enum Split {}

impl Split {
    /// There is nothing to gain here.
    pub fn new(_rows: &impl Rows, _workers: &Workers) -> Result<Option<Self>> {
        Ok(None)
    }

    pub fn tile<'s>(&self, _: Range<usize>, _: &Columns, _: &'s mut Scratch) -> &'s mut [f32] {
        match *self {}
    }
}

/// None such.
#[derive(Default)]
pub(crate) struct Columns;

impl Columns {
    pub fn refill(&mut self, rows: &Split, _which: Range<usize>) {
        match *rows {}
    }

    pub fn padded(&self) -> usize {
        0
    }
}
