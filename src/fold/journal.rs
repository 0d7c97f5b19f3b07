//! Changing bytes of files in place so that a crash at any moment can be mended.
//!
//! A change is written down before it is made: a journal holds, for each place, the bytes before and
//! after. It is flushed and renamed to its final name; only then are the files touched. A process that
//! finds a journal completes the change. When the change is done an apply's journal becomes the undo
//! record of its patch, and a removal deletes both. Failing to write the journal (a full disk) leaves
//! the files as they were; failing in the middle of the change puts the old bytes back.
//!
//! # The file, byte by byte
//! | bytes | content |
//! |---|---|
//! | 8 | `NESTUND1` |
//! | 8 | length n of the header, u64, little-endian |
//! | n | the header, JSON: `action` (`apply` or `remove`), `patch` (its id), `info` (a string), `blocks` |
//! | | for each block: the old bytes of all its rows, then the new ones |
//! | 32 | SHA-256 of everything before |
//!
//! A block is `{"file", "item", "stride", "count", "offsets"}`: row i begins at `offsets[i]` of the file
//! and has `count` items of `item` bytes, `stride` bytes apart.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"NESTUND1";
const MAX_HEADER: u64 = 100_000_000;
/// How much of a file is copied before its rows are changed.
const WINDOW: u64 = 32 << 20;

/// Puts a patch on, or takes it off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// The journal stays as the patch's undo record.
    Apply,
    /// The patch's undo record goes.
    Remove,
}

/// Where the rows of one block lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// The file, relative to the root.
    pub file: String,
    /// Bytes of an item.
    pub item: u64,
    /// Bytes from one item of a row to the next.
    pub stride: u64,
    /// Items of a row.
    pub count: u64,
    /// Where each row begins.
    pub offsets: Vec<u64>,
}

/// Rows of one file, before and after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Where they lie.
    pub place: Place,
    /// Their bytes before, row after row.
    pub old: Vec<u8>,
    /// Their bytes after.
    pub new: Vec<u8>,
}

/// A change, as a journal or an undo record holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// On or off.
    pub action: Action,
    /// The patch's id, 64 hexadecimal digits.
    pub patch: String,
    /// What the caller wants kept with it.
    pub info: String,
    /// The rows that change.
    pub blocks: Vec<Block>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    action: Action,
    patch: String,
    info: String,
    blocks: Vec<Place>,
}

impl Place {
    /// Bytes of a row.
    fn row(&self) -> Option<u64> {
        self.item.checked_mul(self.count)
    }

    fn bytes(&self) -> Option<usize> {
        let bytes = self.row()?.checked_mul(self.offsets.len() as u64)?;
        usize::try_from(bytes).ok()
    }

    /// Where the farthest byte ends.
    fn end(&self) -> Option<u64> {
        let span = self.count.checked_sub(1)?.checked_mul(self.stride)?;
        let last = self.offsets.iter().max()?;
        last.checked_add(span)?.checked_add(self.item)
    }

    fn sound(&self) -> bool {
        let path = Path::new(&self.file);
        let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
        let apart = self.count == 1 || self.stride >= self.item;
        plain && !self.file.is_empty() && self.item > 0 && apart && self.end().is_some()
    }

    /// Opens the file, which must be there in its own right and long enough.
    fn open(&self, root: &Path) -> Result<(PathBuf, File)> {
        let path = root.join(&self.file);
        let meta = std::fs::symlink_metadata(&path).map_err(Error::io(&path))?;
        if !meta.is_file() {
            return Err(Error::target(&path, "it is a link or no file"));
        }
        if self.end().is_none_or(|end| end > meta.len()) {
            return Err(Error::target(&path, "it is too short for this change"));
        }
        let file = OpenOptions::new().read(true).write(true).open(&path);
        Ok((path.clone(), file.map_err(Error::io(&path))?))
    }

    /// True if each row is one run of bytes.
    fn solid(&self) -> bool {
        self.count == 1 || self.stride == self.item
    }

    /// Columns of one grid: item i of every row lies in the same `stride` bytes. Gives their first
    /// byte and how many bytes of a line they span.
    fn columns(&self) -> Option<(u64, usize)> {
        let first = *self.offsets.iter().min()?;
        let width = self.offsets.iter().max()? - first + self.item;
        (!self.solid() && width <= self.stride).then_some((first, width as usize))
    }

    /// Calls `work` with the offset and the place in the rows' bytes of every run that ends in `window`.
    fn each(
        &self,
        window: &Range<u64>,
        mut work: impl FnMut(u64, Range<usize>) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let (runs, run) = if self.solid() {
            (1, self.item * self.count)
        } else {
            (self.count, self.item)
        };
        for (row, &offset) in self.offsets.iter().enumerate() {
            for i in ending(offset + run, self.stride, runs, window) {
                let at = ((row as u64 * runs + i) * run) as usize;
                work(offset + i * self.stride, at..at + run as usize)?;
            }
        }
        Ok(())
    }

    /// For columns: calls `work` with a line and the place in it and in the rows' bytes of each item, for the
    /// lines that end in `window`; writes the line back if `write` is set.
    fn each_line(
        &self,
        file: &mut File,
        (first, width): (u64, usize),
        window: &Range<u64>,
        write: bool,
        mut work: impl FnMut(&mut [u8], Range<usize>),
    ) -> std::io::Result<()> {
        let (item, count) = (self.item as usize, self.count as usize);
        let mut line = vec![0; width];
        for i in ending(first + width as u64, self.stride, self.count, window) {
            let start = SeekFrom::Start(first + i * self.stride);
            file.seek(start)?;
            file.read_exact(&mut line)?;
            for (row, &offset) in self.offsets.iter().enumerate() {
                let at = (row * count + i as usize) * item;
                let column = (offset - first) as usize;
                work(&mut line[column..column + item], at..at + item);
            }
            if write {
                file.seek(start)?;
                file.write_all(&line)?;
            }
        }
        Ok(())
    }

    fn read(&self, file: &mut File) -> std::io::Result<Vec<u8>> {
        let mut out = vec![0; self.bytes().unwrap_or(0)];
        match self.columns() {
            Some(columns) => self.each_line(file, columns, &WHOLE, false, |item, at| {
                out[at].copy_from_slice(item);
            })?,
            None => self.each(&WHOLE, |offset, at| {
                file.seek(SeekFrom::Start(offset))?;
                file.read_exact(&mut out[at])
            })?,
        }
        Ok(out)
    }

    fn write(&self, file: &mut File, bytes: &[u8]) -> std::io::Result<()> {
        self.write_within(file, bytes, &WHOLE)
    }

    /// Writes what ends in `window`.
    fn write_within(
        &self,
        file: &mut File,
        bytes: &[u8],
        window: &Range<u64>,
    ) -> std::io::Result<()> {
        match self.columns() {
            Some(columns) => self.each_line(file, columns, window, true, |item, at| {
                item.copy_from_slice(&bytes[at]);
            }),
            None => self.each(window, |offset, at| {
                file.seek(SeekFrom::Start(offset))?;
                file.write_all(&bytes[at])
            }),
        }
    }
}

/// Everything.
const WHOLE: Range<u64> = 0..u64::MAX;

/// Which of `count` runs end in `window` (its start excluded, its end included), if the first ends at `end` and
/// they are `stride` apart.
fn ending(end: u64, stride: u64, count: u64, window: &Range<u64>) -> Range<u64> {
    let until = |limit: u64| match limit.checked_sub(end) {
        None => 0,
        Some(past) => past
            .checked_div(stride)
            .map_or(count, |n| count.min(n.saturating_add(1))),
    };
    until(window.start)..until(window.end)
}

/// Reads rows of a file: `offsets.len()` rows, one after the other.
///
/// # Errors
/// The file is a link, too short, or cannot be opened for reading and writing.
pub fn read_rows(root: &Path, place: &Place) -> Result<Vec<u8>> {
    let path = root.join(&place.file);
    let mut file = File::open(&path).map_err(Error::io(&path))?;
    let len = file.metadata().map_err(Error::io(&path))?.len();
    if place.bytes().is_none() || place.end().is_none_or(|end| end > len) {
        return Err(Error::target(&path, "it is too short"));
    }
    place.read(&mut file).map_err(Error::io(&path))
}

impl Change {
    /// Makes the change under a journal in `state`, a folder of its own beside the files of `root`.
    ///
    /// # Errors
    /// An earlier change is unfinished, another process is at work, the bytes in place are not the old
    /// ones, or the disk refuses. The files are then as they were, or a journal is left that
    /// [`recover`] completes.
    pub fn commit(&self, root: &Path, state: &Path) -> Result<()> {
        let _lock = lock(root)?;
        let journal = state.join("journal");
        if journal.exists() {
            return Err(Error::target(&journal, "an earlier change is unfinished"));
        }
        let mut files = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (path, mut file) = block.place.open(root)?;
            if block.place.read(&mut file).map_err(Error::io(&path))? != block.old {
                return Err(stale(&path));
            }
            files.push((path, file));
        }
        let fresh = !state.exists();
        let made = self.write_journal(state, &journal);
        if made.is_err() && fresh {
            let _ = std::fs::remove_dir(state);
        }
        made?;
        for (at, (block, (_, file))) in self.blocks.iter().zip(&mut files).enumerate() {
            let written = block.place.write(file, &block.new);
            if let Err(error) = written.and_then(|()| file.sync_data()) {
                self.roll_back(&mut files[..=at], &journal);
                return Err(Error::Io {
                    path: files[at].0.clone(),
                    source: error,
                });
            }
        }
        self.finish(state, &journal)
    }

    /// Copies a file to `dst`, which must not exist, with the change made; the change knows it by its name.
    ///
    /// The rows are changed while their pages are fresh: once the system writes these out, a change of them waits.
    /// Nothing is flushed: a copy that is cut short is there to be thrown away. Where the file system can share
    /// the bytes of a copy, it does.
    ///
    /// # Errors
    /// The bytes in place are not the old ones, the file is too short, `dst` exists, or the disk refuses.
    pub fn copy(&self, src: &Path, dst: &Path) -> Result<()> {
        let name = src.file_name().and_then(|name| name.to_str());
        let of_file = |block: &&Block| Some(block.place.file.as_str()) == name;
        let blocks: Vec<&Block> = self.blocks.iter().filter(of_file).collect();
        let mut from = File::open(src).map_err(Error::io(src))?;
        let length = from.metadata().map_err(Error::io(src))?.len();
        if blocks
            .iter()
            .any(|block| block.place.end().is_none_or(|end| end > length))
        {
            return Err(Error::target(src, "it is too short for this change"));
        }
        for block in &blocks {
            if block.place.read(&mut from).map_err(Error::io(src))? != block.old {
                return Err(stale(src));
            }
        }
        let mut open = OpenOptions::new();
        let opened = open.read(true).write(true).create_new(true).open(dst);
        let mut to = opened.map_err(Error::io(dst))?;
        let mut at = 0;
        loop {
            let go_on = (&from)
                .seek(SeekFrom::Start(at))
                .and_then(|_| to.seek(SeekFrom::Start(at)));
            go_on.map_err(Error::io(dst))?;
            let moved = std::io::copy(&mut (&from).take(WINDOW), &mut to);
            let window = at..at + moved.map_err(Error::io(dst))?;
            if window.is_empty() {
                return Ok(());
            }
            for block in &blocks {
                let written = block.place.write_within(&mut to, &block.new, &window);
                written.map_err(Error::io(dst))?;
            }
            at = window.end;
        }
    }

    /// Notes in `state`, that of a fresh copy, that the change was made: an apply leaves its record there, a
    /// removal deletes it. As with the copy, nothing is flushed: that would drag the whole copy to the disk.
    ///
    /// # Errors
    /// The disk's.
    pub fn note(&self, state: &Path) -> Result<()> {
        let record = record_path(state, &self.patch);
        match self.action {
            Action::Apply => {
                std::fs::create_dir_all(state).map_err(Error::io(state))?;
                let mut file = File::create(&record).map_err(Error::io(&record))?;
                self.encode(|bytes| file.write_all(bytes))
                    .map_err(Error::io(&record))
            }
            Action::Remove => {
                remove_if_there(&record).map_err(Error::io(&record))?;
                // Gone if it is empty.
                let _ = std::fs::remove_dir(state);
                Ok(())
            }
        }
    }

    /// Writes the old bytes again; the journal stays if that fails too.
    fn roll_back(&self, files: &mut [(PathBuf, File)], journal: &Path) {
        let whole = self.blocks.iter().zip(files).all(|(block, (_, file))| {
            block
                .place
                .write(file, &block.old)
                .and_then(|()| file.sync_data())
                .is_ok()
        });
        if whole {
            let _ = std::fs::remove_file(journal);
        }
    }

    fn write_journal(&self, state: &Path, journal: &Path) -> Result<()> {
        if state.is_symlink() {
            return Err(Error::target(state, "it is a link"));
        }
        std::fs::create_dir_all(state).map_err(Error::io(state))?;
        let partial = state.join("journal.partial");
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&partial)?;
            self.encode(|bytes| file.write_all(bytes))?;
            file.sync_all()?;
            std::fs::rename(&partial, journal)
        };
        let done = write().map_err(Error::io(journal));
        if done.is_err() {
            let _ = std::fs::remove_file(&partial);
        }
        done?;
        sync_folder(state);
        Ok(())
    }

    /// Hands the bytes of the journal to `put`, piece by piece.
    fn encode(&self, mut put: impl FnMut(&[u8]) -> std::io::Result<()>) -> std::io::Result<()> {
        let head = serde_json::to_vec(&Head {
            action: self.action,
            patch: self.patch.clone(),
            info: self.info.clone(),
            blocks: self.blocks.iter().map(|b| b.place.clone()).collect(),
        })?;
        let mut hash = Sha256::new();
        let mut put_hashed = |bytes: &[u8]| {
            hash.update(bytes);
            put(bytes)
        };
        put_hashed(MAGIC)?;
        put_hashed(&(head.len() as u64).to_le_bytes())?;
        put_hashed(&head)?;
        for block in &self.blocks {
            put_hashed(&block.old)?;
            put_hashed(&block.new)?;
        }
        put(&hash.finalize())
    }

    fn finish(&self, state: &Path, journal: &Path) -> Result<()> {
        let record = record_path(state, &self.patch);
        match self.action {
            Action::Apply => std::fs::rename(journal, &record).map_err(Error::io(journal))?,
            Action::Remove => {
                remove_if_there(&record).map_err(Error::io(&record))?;
                std::fs::remove_file(journal).map_err(Error::io(journal))?;
            }
        }
        sync_folder(state);
        // Gone if it is empty.
        let _ = std::fs::remove_dir(state);
        Ok(())
    }
}

fn remove_if_there(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn stale(path: &Path) -> Error {
    Error::target(path, "it changed while it was being read")
}

/// Where the undo record of a patch lies.
pub fn record_path(state: &Path, patch: &str) -> PathBuf {
    state.join(format!("undo-{}", patch.get(..16).unwrap_or(patch)))
}

/// Completes a change that was cut short; `None` if there is none.
///
/// # Errors
/// The journal is damaged, or a file holds something that is neither the old bytes nor the new ones.
pub fn recover(root: &Path, state: &Path) -> Result<Option<(Action, String)>> {
    let journal = state.join("journal");
    let partial = state.join("journal.partial");
    if !journal.exists() && !partial.exists() {
        return Ok(None);
    }
    let _lock = lock(root)?;
    // Never trusted, never used: its writer died before it touched anything.
    let _ = std::fs::remove_file(&partial);
    if !journal.exists() {
        let _ = std::fs::remove_dir(state);
        return Ok(None);
    }
    let change = read_change(&journal)?;
    let mut files = Vec::with_capacity(change.blocks.len());
    for block in &change.blocks {
        let (path, mut file) = block.place.open(root)?;
        let now = block.place.read(&mut file).map_err(Error::io(&path))?;
        let torn = now
            .iter()
            .zip(&block.old)
            .zip(&block.new)
            .all(|((n, a), b)| n == a || n == b);
        if !torn {
            let reason = format!(
                "it is not the file that `{}` was changing; if it was replaced, delete that journal",
                journal.display()
            );
            return Err(Error::target(&path, reason));
        }
        files.push((path, file));
    }
    for (block, (path, file)) in change.blocks.iter().zip(&mut files) {
        block
            .place
            .write(file, &block.new)
            .and_then(|()| file.sync_data())
            .map_err(Error::io(path))?;
    }
    change.finish(state, &journal)?;
    Ok(Some((change.action, change.patch)))
}

/// Reads a journal or an undo record.
///
/// # Errors
/// It is missing or damaged.
pub fn read_change(path: &Path) -> Result<Change> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    parse_change(&bytes)
        .map_err(|reason| Error::target(path, format!("not a valid undo record: {reason}")))
}

/// Parses a journal or an undo record.
///
/// # Errors
/// What is wrong with it.
pub fn parse_change(bytes: &[u8]) -> std::result::Result<Change, String> {
    let Some((body, digest)) = bytes.split_at_checked(bytes.len().wrapping_sub(32)) else {
        return Err(format!("it has `{}` bytes", bytes.len()));
    };
    let (Some(magic), Some(length)) = (body.get(..8), body.get(8..16)) else {
        return Err(format!("it has `{}` bytes", bytes.len()));
    };
    if magic != MAGIC {
        return Err("it does not begin with `NESTUND1`".into());
    }
    let length = length
        .try_into()
        .map(u64::from_le_bytes)
        .unwrap_or(u64::MAX);
    if length > MAX_HEADER || length > body.len() as u64 - 16 {
        return Err(format!("it claims a header of `{length}` bytes"));
    }
    if Sha256::digest(body).as_slice() != digest {
        return Err("its SHA-256 does not fit".into());
    }
    let (head, mut data) = body[16..].split_at(length as usize);
    let head: Head = serde_json::from_slice(head).map_err(|e| format!("its header: {e}"))?;
    if head.patch.len() != 64 || !head.patch.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(format!("its patch id is `{}`", head.patch));
    }
    let mut blocks = Vec::with_capacity(head.blocks.len());
    for place in head.blocks {
        if !place.sound() {
            return Err(format!("its block for `{}` is not sound", place.file));
        }
        let mut take = || {
            let (part, rest) = data.split_at_checked(place.bytes()?)?;
            data = rest;
            Some(part.to_vec())
        };
        let (Some(old), Some(new)) = (take(), take()) else {
            return Err("it is too short".into());
        };
        blocks.push(Block { place, old, new });
    }
    if !data.is_empty() {
        return Err(format!("`{}` bytes belong to no block", data.len()));
    }
    Ok(Change {
        action: head.action,
        patch: head.patch,
        info: head.info,
        blocks,
    })
}

/// One process at a time; systems that cannot lock a folder do without.
fn lock(root: &Path) -> Result<Option<File>> {
    let Ok(folder) = File::open(root) else {
        return Ok(None);
    };
    match folder.try_lock() {
        Err(std::fs::TryLockError::WouldBlock) => {
            Err(Error::target(root, "another process is changing it"))
        }
        _ => Ok(Some(folder)),
    }
}

fn sync_folder(path: &Path) {
    // Not every system can flush a folder.
    if let Ok(folder) = File::open(path) {
        let _ = folder.sync_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two rows where zeros were.
    fn block(
        file: &str,
        (item, stride, count): (u64, u64, u64),
        offsets: [u64; 2],
        new: &[u8],
    ) -> Block {
        let place = Place {
            file: file.into(),
            item,
            stride,
            count,
            offsets: offsets.into(),
        };
        let old = vec![0; new.len()];
        let new = new.into();
        Block { place, old, new }
    }

    /// Two runs of a file, out of order, and two columns of another.
    fn change(action: Action) -> Change {
        Change {
            action,
            patch: "ab".repeat(32),
            info: "{}".into(),
            blocks: vec![
                block("a", (2, 2, 2), [8, 0], &[1, 2, 3, 4, 5, 6, 7, 8]),
                block("b", (1, 4, 3), [3, 1], &[1, 2, 3, 7, 8, 9]),
            ],
        }
    }

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            std::fs::write(folder.path().join(name), [0; 12]).unwrap();
        }
        let state = folder.path().join(".nest-rs");
        (folder, state)
    }

    fn reverse(change: &Change) -> Change {
        let mut back = change.clone();
        back.action = Action::Remove;
        for block in &mut back.blocks {
            std::mem::swap(&mut block.old, &mut block.new);
        }
        back
    }

    const AFTER: ([u8; 12], [u8; 12]) = (
        [5, 6, 7, 8, 0, 0, 0, 0, 1, 2, 3, 4],
        [0, 7, 0, 1, 0, 8, 0, 2, 0, 9, 0, 3],
    );

    fn content(root: &Path) -> (Vec<u8>, Vec<u8>) {
        (
            std::fs::read(root.join("a")).unwrap(),
            std::fs::read(root.join("b")).unwrap(),
        )
    }

    #[test]
    fn a_change_goes_on_and_comes_off() {
        let (folder, state) = folder();
        let root = folder.path();
        let on = change(Action::Apply);
        on.commit(root, &state).unwrap();
        assert_eq!(content(root), (AFTER.0.to_vec(), AFTER.1.to_vec()));
        let record = record_path(&state, &on.patch);
        assert_eq!(read_change(&record).unwrap(), on);
        assert_eq!(
            read_rows(root, &on.blocks[1].place).unwrap(),
            [1, 2, 3, 7, 8, 9]
        );
        assert!(on.commit(root, &state).is_err(), "the old bytes are gone");
        reverse(&on).commit(root, &state).unwrap();
        assert_eq!(content(root), (vec![0; 12], vec![0; 12]));
        assert!(!state.exists());
    }

    #[test]
    fn a_copy_holds_the_change_and_the_original_stays() {
        let (folder, state) = folder();
        let root = folder.path();
        let on = change(Action::Apply);
        let copies = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            on.copy(&root.join(name), &copies.path().join(name))
                .unwrap();
            assert!(
                on.copy(&root.join(name), &copies.path().join(name))
                    .is_err()
            );
        }
        assert_eq!(content(root), (vec![0; 12], vec![0; 12]));
        assert_eq!(content(copies.path()), (AFTER.0.to_vec(), AFTER.1.to_vec()));
        on.note(&state).unwrap();
        assert_eq!(read_change(&record_path(&state, &on.patch)).unwrap(), on);
        reverse(&on).note(&state).unwrap();
        assert!(!state.exists());
        std::fs::write(root.join("b"), [3; 12]).unwrap();
        assert!(on.copy(&root.join("b"), &copies.path().join("c")).is_err());
        std::fs::write(root.join("b"), [0; 11]).unwrap();
        assert!(on.copy(&root.join("b"), &copies.path().join("c")).is_err());
        assert!(!copies.path().join("c").exists());
    }

    #[test]
    fn windows_part_the_runs_of_a_place() {
        let on = change(Action::Apply);
        for step in 1..=12 {
            for (block, after) in on.blocks.iter().zip([AFTER.0, AFTER.1]) {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(&[0; 12]).unwrap();
                for start in (0..12).step_by(step as usize) {
                    let window = start..(start + step).min(12);
                    block
                        .place
                        .write_within(&mut file, &block.new, &window)
                        .unwrap();
                    let mut now = [0; 12];
                    file.seek(SeekFrom::Start(0)).unwrap();
                    file.read_exact(&mut now).unwrap();
                    // What lies behind the window is not touched: a copy has not got there yet.
                    assert_eq!(now[window.end as usize..], [0; 12][window.end as usize..]);
                }
                let mut now = [0; 12];
                file.seek(SeekFrom::Start(0)).unwrap();
                file.read_exact(&mut now).unwrap();
                assert_eq!(now, after, "windows of {step}");
            }
        }
    }

    #[test]
    fn a_journal_is_completed_wherever_the_writer_died() {
        let on = change(Action::Apply);
        for done in 0..=11usize {
            let (folder, state) = folder();
            let root = folder.path();
            on.write_journal(&state, &state.join("journal")).unwrap();
            let mut half = [0u8; 12];
            half[12 - done..].copy_from_slice(&AFTER.0[12 - done..]);
            std::fs::write(root.join("a"), half).unwrap();
            assert_eq!(
                recover(root, &state).unwrap(),
                Some((Action::Apply, on.patch.clone()))
            );
            assert_eq!(content(root), (AFTER.0.to_vec(), AFTER.1.to_vec()));
            assert_eq!(recover(root, &state).unwrap(), None);
            assert!(record_path(&state, &on.patch).exists());
        }
    }

    #[test]
    fn a_journal_of_other_files_is_refused() {
        let (folder, state) = folder();
        let root = folder.path();
        change(Action::Apply)
            .write_journal(&state, &state.join("journal"))
            .unwrap();
        std::fs::write(root.join("b"), [3; 12]).unwrap();
        assert!(
            recover(root, &state)
                .unwrap_err()
                .to_string()
                .contains("delete that journal")
        );
        assert_eq!(content(root), (vec![0; 12], vec![3; 12]));
    }

    #[test]
    fn unsound_places_are_refused() {
        let good = change(Action::Apply);
        let spoil = |spoil: &dyn Fn(&mut Change)| {
            let mut bad = good.clone();
            spoil(&mut bad);
            let (folder, state) = folder();
            let journal = state.join("journal");
            bad.write_journal(&state, &journal).unwrap();
            let result = recover(folder.path(), &state);
            assert!(result.is_err(), "{bad:?}");
            assert_eq!(content(folder.path()), (vec![0; 12], vec![0; 12]));
        };
        spoil(&|c| c.blocks[0].place.file = "../a".into());
        spoil(&|c| c.blocks[0].place.file = "/a".into());
        spoil(&|c| c.blocks[0].place.file = String::new());
        spoil(&|c| c.blocks[0].place.file = "none".into());
        spoil(&|c| c.blocks[0].place.offsets = vec![9, 0]);
        spoil(&|c| c.blocks[0].place.offsets = vec![u64::MAX, 0]);
        spoil(&|c| c.blocks[1].place.stride = 6);
        spoil(&|c| c.blocks[1].place.stride = 0);
        spoil(&|c| c.blocks[1].place.stride = u64::MAX);
        spoil(&|c| c.blocks[1].place.count = u64::MAX);
        spoil(&|c| c.blocks[1].place.item = 0);
        spoil(&|c| c.blocks[1].new = vec![1]);
        spoil(&|c| c.patch = "short".into());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_change_or_an_error(
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            cut in prop::option::of(any::<prop::sample::Index>()),
            sign in any::<bool>(),
        ) {
            let mut bytes = Vec::new();
            change(Action::Apply)
                .encode(|part| {
                    bytes.extend(part);
                    Ok(())
                })
                .unwrap();
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            if sign && bytes.len() >= 32 {
                let end = bytes.len() - 32;
                let (body, digest) = bytes.split_at_mut(end);
                digest.copy_from_slice(&Sha256::digest(body));
            }
            if let Ok(change) = parse_change(&bytes) {
                for block in change.blocks {
                    prop_assert!(block.place.sound() && block.old.len() == block.new.len());
                }
            }
        }
    }
}
