//! Memory that begins on a cache line: a vector register, or a row of a tile, is then read from one line and
//! not from two.

use std::ops::{Deref, DerefMut};

use bytemuck::Pod;

const LINE: usize = 64;

/// A buffer of numbers that begins on a cache line.
#[derive(Default)]
pub(super) struct Lines<T> {
    memory: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Pod> Lines<T> {
    /// So many zeros; their memory is touched by whoever writes it first.
    pub fn zeros(len: usize) -> Self {
        let memory = vec![T::zeroed(); len + LINE / size_of::<T>()];
        Lines {
            start: memory.as_ptr().align_offset(LINE),
            memory,
            len,
        }
    }

    /// Makes it so long, of any values.
    pub fn resize(&mut self, len: usize) {
        if self.memory.len() < self.start + len {
            *self = Self::zeros(len);
        }
        self.len = len;
    }

    /// So many zeros.
    #[cfg(target_arch = "x86_64")]
    pub fn clear_to(&mut self, len: usize) {
        self.resize(len);
        self.fill(T::zeroed());
    }
}

impl<T> Deref for Lines<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl<T> DerefMut for Lines<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_buffer_begins_on_a_line_however_it_came_by_its_length() {
        let mut lines = Lines::<f32>::zeros(5);
        for len in [5, 3, 1000, 17] {
            lines.clear_to(len);
            assert_eq!(lines.as_ptr() as usize % LINE, 0);
            assert_eq!(&lines[..], vec![0.0; len]);
            lines.fill(1.0);
        }
        lines.resize(9);
        assert_eq!(lines[..], [1.0; 9]);
    }
}
