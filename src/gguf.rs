//! Reading the header of a GGUF file, trusting nothing in it.
//!
//! Only what a patch needs is kept: where each tensor's bytes lie, and the short metadata. Format:
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little-endian.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use crate::error::{Error, Result};

const MAX_NAME: u64 = 65_535;
const MAX_STRING: u64 = 100_000_000;
const MAX_DEPTH: u32 = 4;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Its name, such as `blk.0.ffn_up.weight`.
    pub name: String,
    /// Its ggml type number: 0 is F32, 1 F16, 2 Q4_0, ...
    pub kind: u32,
    /// Its shape, the width of a row first.
    pub shape: Vec<u64>,
    /// Where its bytes begin and end, from the start of the file; empty for a type we do not know.
    pub span: (u64, u64),
}

/// The header of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GgufHeader {
    /// Its tensors, in the header's order.
    pub tensors: Vec<GgufTensor>,
    /// The metadata that are strings of up to 1000 bytes.
    pub strings: BTreeMap<String, String>,
    /// The metadata that are whole numbers, none negative.
    pub numbers: BTreeMap<String, u64>,
}

/// Elements and bytes of a block, for the types whose size matters here.
fn block(kind: u32) -> Option<(u64, u64)> {
    Some(match kind {
        0 => (1, 4),      // F32
        1 | 30 => (1, 2), // F16, BF16
        2 => (32, 18),    // Q4_0
        3 => (32, 20),    // Q4_1
        6 => (32, 22),    // Q5_0
        7 => (32, 24),    // Q5_1
        8 => (32, 34),    // Q8_0
        _ => return None,
    })
}

/// Reads and checks a header.
///
/// # Errors
/// [`Error::Target`]: not GGUF, truncated, or it lies about the bytes behind it.
pub fn read(path: &Path) -> Result<GgufHeader> {
    let file = File::open(path).map_err(Error::io(path))?;
    let len = file.metadata().map_err(Error::io(path))?.len();
    parse(BufReader::with_capacity(1 << 16, file), len)
        .map_err(|reason| Error::target(path, format!("not a valid GGUF file: {reason}")))
}

type Parsed<T> = std::result::Result<T, String>;

struct Cursor<R> {
    source: R,
    at: u64,
    len: u64,
}

impl<R: Read> Cursor<R> {
    fn bytes<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let mut out = [0; N];
        self.source
            .read_exact(&mut out)
            .map_err(|_| format!("it ends at byte `{}`, within its header", self.len))?;
        self.at += N as u64;
        Ok(out)
    }

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn skip(&mut self, count: u64) -> Parsed<()> {
        let left = self.len.saturating_sub(self.at);
        let skipped = if count > left {
            None
        } else {
            std::io::copy(&mut self.source.by_ref().take(count), &mut std::io::sink()).ok()
        };
        if skipped != Some(count) {
            return Err(format!(
                "`{count}` bytes at byte `{}` are not there",
                self.at
            ));
        }
        self.at += count;
        Ok(())
    }

    fn string(&mut self, most: u64) -> Parsed<String> {
        let length = self.u64()?;
        if length > most || length > self.len.saturating_sub(self.at) {
            return Err(format!("it claims a string of `{length}` bytes"));
        }
        let mut out = vec![0; length as usize];
        self.source
            .read_exact(&mut out)
            .map_err(|_| "it ends within a string".to_string())?;
        self.at += length;
        String::from_utf8(out).map_err(|_| format!("the string at byte `{}` is not UTF-8", self.at))
    }

    /// A value: whole number, string, or neither.
    fn value(&mut self, kind: u32, depth: u32) -> Parsed<(Option<u64>, Option<String>)> {
        let number = match kind {
            0 | 7 => u64::from(self.bytes::<1>()?[0]),
            1 => return self.signed::<1>(),
            2 => u64::from(u16::from_le_bytes(self.bytes()?)),
            3 => return self.signed::<2>(),
            4 => u64::from(self.u32()?),
            5 => return self.signed::<4>(),
            6 => return self.skip(4).map(|()| (None, None)),
            8 => {
                let text = self.string(MAX_STRING)?;
                return Ok((None, (text.len() <= 1000).then_some(text)));
            }
            9 => {
                let (kind, count) = (self.u32()?, self.u64()?);
                if depth >= MAX_DEPTH {
                    return Err("its arrays are nested too deep".into());
                }
                match fixed(kind) {
                    Some(size) => self.skip(
                        count
                            .checked_mul(size)
                            .ok_or_else(|| format!("it claims an array of `{count}` values"))?,
                    )?,
                    None => {
                        // Each value takes eight bytes at least, so a lie ends at the file's end.
                        for _ in 0..count {
                            if kind == 8 {
                                let length = self.u64()?;
                                self.skip(length)?;
                            } else {
                                self.value(kind, depth + 1)?;
                            }
                        }
                    }
                }
                return Ok((None, None));
            }
            10 => self.u64()?,
            11 => return self.signed::<8>(),
            12 => return self.skip(8).map(|()| (None, None)),
            _ => return Err(format!("it has a value of the unknown type `{kind}`")),
        };
        Ok((Some(number), None))
    }

    fn signed<const N: usize>(&mut self) -> Parsed<(Option<u64>, Option<String>)> {
        let bytes = self.bytes::<N>()?;
        let fill = if bytes[N - 1] & 0x80 == 0 { 0 } else { 0xff };
        let mut wide = [fill; 8];
        wide[..N].copy_from_slice(&bytes);
        Ok((u64::try_from(i64::from_le_bytes(wide)).ok(), None))
    }
}

fn fixed(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Parses the header of a file of `len` bytes.
pub(crate) fn parse(source: impl Read, len: u64) -> Parsed<GgufHeader> {
    let mut cursor = Cursor { source, at: 0, len };
    if &cursor.bytes::<4>()? != b"GGUF" {
        return Err("it does not begin with `GGUF`".into());
    }
    let version = cursor.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("its version is `{version}`, expected 2 or 3"));
    }
    let (n_tensors, n_values) = (cursor.u64()?, cursor.u64()?);
    // An entry takes more than eight bytes.
    if n_tensors > len / 8 || n_values > len / 8 {
        return Err(format!(
            "it claims `{n_tensors}` tensors and `{n_values}` values"
        ));
    }
    let mut header = GgufHeader::default();
    for _ in 0..n_values {
        let key = cursor.string(MAX_NAME)?;
        let kind = cursor.u32()?;
        let (number, text) = cursor.value(kind, 0)?;
        if header.numbers.contains_key(&key) || header.strings.contains_key(&key) {
            return Err(format!("the key `{key}` twice"));
        }
        if let Some(number) = number {
            header.numbers.insert(key, number);
        } else if let Some(text) = text {
            header.strings.insert(key, text);
        }
    }
    let mut names = std::collections::BTreeSet::new();
    for _ in 0..n_tensors {
        let name = cursor.string(MAX_NAME)?;
        let dims = cursor.u32()?;
        if dims > 4 {
            return Err(format!("tensor `{name}` has `{dims}` dimensions"));
        }
        let mut shape = Vec::with_capacity(4);
        for _ in 0..dims {
            shape.push(cursor.u64()?);
        }
        let kind = cursor.u32()?;
        let offset = cursor.u64()?;
        if !names.insert(name.clone()) {
            return Err(format!("tensor `{name}` twice"));
        }
        header.tensors.push(GgufTensor {
            name,
            kind,
            shape,
            span: (offset, offset),
        });
    }
    let alignment = header
        .numbers
        .get("general.alignment")
        .copied()
        .unwrap_or(32);
    if alignment == 0 || !alignment.is_power_of_two() || alignment > 1 << 20 {
        return Err(format!("its alignment is `{alignment}`"));
    }
    let data = cursor.at.next_multiple_of(alignment);
    let mut spans = Vec::with_capacity(header.tensors.len());
    for tensor in &mut header.tensors {
        let offset = tensor.span.0;
        let span = || {
            let begin = data.checked_add(offset)?;
            let Some((elements, bytes)) = block(tensor.kind) else {
                return Some((begin, begin));
            };
            let count = tensor
                .shape
                .iter()
                .try_fold(1u64, |n, &s| n.checked_mul(s))?;
            let whole = tensor
                .shape
                .first()
                .is_none_or(|width| width % elements == 0);
            let size = (count / elements).checked_mul(bytes).filter(|_| whole)?;
            Some((begin, begin.checked_add(size).filter(|&end| end <= len)?))
        };
        tensor.span = span().ok_or_else(|| {
            format!(
                "tensor `{}` of shape `{:?}` and type `{}` does not fit at `{offset}`",
                tensor.name, tensor.shape, tensor.kind
            )
        })?;
        if !offset.is_multiple_of(alignment) || tensor.span.0 > len {
            return Err(format!(
                "tensor `{}` is at the odd place `{offset}`",
                tensor.name
            ));
        }
        spans.push((tensor.span, &tensor.name));
    }
    spans.sort_unstable();
    if let Some(pair) = spans.windows(2).find(|pair| pair[0].0.1 > pair[1].0.0) {
        return Err(format!(
            "tensors `{}` and `{}` overlap",
            pair[0].1, pair[1].1
        ));
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    fn small() -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(2u64.to_le_bytes());
        out.extend(4u64.to_le_bytes());
        text(&mut out, "general.architecture");
        out.extend(8u32.to_le_bytes());
        text(&mut out, "llama");
        text(&mut out, "llama.block_count");
        out.extend(4u32.to_le_bytes());
        out.extend(2u32.to_le_bytes());
        text(&mut out, "tokens");
        out.extend(9u32.to_le_bytes());
        out.extend(8u32.to_le_bytes());
        out.extend(2u64.to_le_bytes());
        text(&mut out, "a");
        text(&mut out, "bc");
        text(&mut out, "low");
        out.extend(5u32.to_le_bytes());
        out.extend((-3i32).to_le_bytes());
        for (name, kind, offset) in [("a", 8u32, 0u64), ("b", 0, 96)] {
            text(&mut out, name);
            out.extend(2u32.to_le_bytes());
            out.extend(32u64.to_le_bytes());
            out.extend(2u64.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32) + 96 + 256, 0);
        out
    }

    fn check(bytes: &[u8]) -> Parsed<GgufHeader> {
        parse(bytes, bytes.len() as u64)
    }

    #[test]
    fn a_good_header_is_read() {
        let bytes = small();
        let header = check(&bytes).unwrap();
        assert_eq!(header.strings["general.architecture"], "llama");
        assert_eq!(header.numbers["llama.block_count"], 2);
        assert_eq!(header.numbers.get("low"), None);
        let [a, b] = &header.tensors[..] else {
            panic!()
        };
        assert_eq!((a.span.1 - a.span.0, b.span.0 - a.span.0), (68, 96));
        assert_eq!(b.span.1, bytes.len() as u64);
        for cut in 0..bytes.len() {
            assert!(check(&bytes[..cut]).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_or_an_error(
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            wild in prop::collection::vec(any::<u8>(), 0..64), whole in any::<bool>(),
        ) {
            let mut bytes = small();
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if whole {
                bytes.splice(24..24 + wild.len(), wild);
            }
            if let Ok(header) = check(&bytes) {
                for tensor in header.tensors {
                    prop_assert!(tensor.span.0 <= tensor.span.1 && tensor.span.1 <= bytes.len() as u64);
                }
            }
        }
    }
}
