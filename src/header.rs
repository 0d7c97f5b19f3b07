//! Reading and writing the header of a safetensors file, trusting nothing in it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::error::{Error, Result};

/// Longest header accepted, as in the safetensors crate.
const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its element type as the header spells it: `F32`, `BF16`, `I8`, ...
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where its bytes begin and end, from the start of the file.
    pub span: (u64, u64),
}

/// The header of a file: its tensors in the order of their bytes, and its free metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The tensors; together they cover the file behind the header without gap or overlap.
    pub tensors: Vec<TensorInfo>,
    /// The `__metadata__` map.
    pub metadata: BTreeMap<String, String>,
    /// Where the first tensor begins.
    pub data_start: u64,
}

impl Header {
    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|t| t.name == name)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

struct Raw {
    tensors: Vec<(String, Entry)>,
    metadata: BTreeMap<String, String>,
}

/// A string map that refuses a repeated key.
struct Strings(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Strings;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a map of strings")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Strings, A::Error> {
                let mut out = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if out.contains_key(&key) {
                        return Err(A::Error::custom(format!("metadata key `{key}` twice")));
                    }
                    out.insert(key, value);
                }
                Ok(Strings(out))
            }
        }
        from.deserialize_map(Keys)
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Raw;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Raw, A::Error> {
                let mut tensors = Vec::new();
                let mut metadata = None;
                while let Some(key) = map.next_key::<String>()? {
                    if key != "__metadata__" {
                        tensors.push((key, map.next_value()?));
                    } else if metadata.is_none() {
                        metadata = Some(map.next_value::<Strings>()?.0);
                    } else {
                        return Err(A::Error::custom("`__metadata__` twice"));
                    }
                }
                Ok(Raw {
                    tensors,
                    metadata: metadata.unwrap_or_default(),
                })
            }
        }
        from.deserialize_map(Names)
    }
}

/// Bits an element, for the types we know.
fn bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ"
        | "F8_E5M2FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// Reads and checks the header of an open file.
pub(crate) fn read(path: &Path, file: &mut File) -> Result<Header> {
    let file_len = file.metadata().map_err(Error::io(path))?.len();
    if file_len < 8 {
        return Err(Error::format(
            path,
            format!("it has `{file_len}` bytes, too few for a header"),
        ));
    }
    let mut length = [0u8; 8];
    file.seek(SeekFrom::Start(0)).map_err(Error::io(path))?;
    file.read_exact(&mut length).map_err(Error::io(path))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER || length > file_len - 8 {
        return Err(Error::format(
            path,
            format!("it claims a header of `{length}` bytes and has `{file_len}` in all"),
        ));
    }
    let mut json = vec![0u8; length as usize];
    file.read_exact(&mut json).map_err(Error::io(path))?;
    parse(&json, file_len).map_err(|reason| Error::format(path, reason))
}

/// Parses and checks a header's JSON for a file of `file_len` bytes.
fn parse(json: &[u8], file_len: u64) -> std::result::Result<Header, String> {
    if json.first() != Some(&b'{') {
        return Err("its header is not a JSON object".to_string());
    }
    let raw: Raw = serde_json::from_slice(json).map_err(|e| format!("its header: {e}"))?;
    let data_start = 8 + json.len() as u64;
    let data_len = file_len - data_start;
    let mut tensors = Vec::with_capacity(raw.tensors.len());
    for (name, entry) in raw.tensors {
        let (begin, end) = entry.data_offsets;
        if begin > end || end > data_len {
            return Err(format!(
                "tensor `{name}` claims bytes `{begin}..{end}` of `{data_len}`"
            ));
        }
        let elements = entry
            .shape
            .iter()
            .try_fold(1u64, |n, &s| n.checked_mul(s as u64))
            .ok_or_else(|| format!("tensor `{name}` has the shape `{:?}`", entry.shape))?;
        if let Some(bits) = bits(&entry.dtype) {
            // Elements of 4 or 6 bits are packed; a tensor ends on a whole byte.
            let size = elements
                .checked_mul(bits)
                .filter(|b| b % 8 == 0)
                .map(|b| b / 8);
            if size != Some(end - begin) {
                return Err(format!(
                    "tensor `{name}` of shape `{:?}` and type `{}` claims `{}` bytes",
                    entry.shape,
                    entry.dtype,
                    end - begin
                ));
            }
        }
        tensors.push(TensorInfo {
            name,
            dtype: entry.dtype,
            shape: entry.shape,
            span: (begin + data_start, end + data_start),
        });
    }
    tensors.sort_by(|a, b| a.span.cmp(&b.span).then_with(|| a.name.cmp(&b.name)));
    let mut covered = data_start;
    for tensor in &tensors {
        if tensor.span.0 != covered {
            let what = if tensor.span.0 < covered {
                "overlaps"
            } else {
                "leaves a gap after"
            };
            return Err(format!(
                "tensor `{}` {what} the tensor before it",
                tensor.name
            ));
        }
        covered = tensor.span.1;
    }
    if covered != file_len {
        return Err(format!(
            "`{}` bytes belong to no tensor",
            file_len - covered
        ));
    }
    let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("tensor `{}` twice", pair[0]));
    }
    Ok(Header {
        tensors,
        metadata: raw.metadata,
        data_start,
    })
}

/// The first bytes of a file that holds `tensors` (name, type, shape, bytes) one after the other;
/// a multiple of 8 bytes long, so that the data is aligned.
pub(crate) fn write(
    tensors: &[(&str, &str, Vec<usize>, u64)],
    metadata: &BTreeMap<String, String>,
) -> Vec<u8> {
    use serde_json::{Value, json};
    let mut fields: Vec<String> = Vec::new();
    if !metadata.is_empty() {
        fields.push(format!("\"__metadata__\":{}", json!(metadata)));
    }
    let mut at = 0;
    for (name, dtype, shape, bytes) in tensors {
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [at, at + bytes]});
        fields.push(format!("{}:{entry}", Value::from(*name)));
        at += bytes;
    }
    let mut json = format!("{{{}}}", fields.join(",")).into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.extend(json);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str, data: u64) -> std::result::Result<Header, String> {
        parse(json.as_bytes(), 8 + json.len() as u64 + data)
    }

    #[test]
    fn a_good_header_is_read_in_the_order_of_its_bytes() {
        let json = r#"{"b":{"dtype":"F16","shape":[2,3],"data_offsets":[8,20]},
            "__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  "#;
        let header = check(json, 20).unwrap();
        assert_eq!(header.tensors[0].name, "a");
        assert_eq!(header.tensors[1].shape, [2, 3]);
        assert_eq!(header.metadata["k"], "v");
    }

    #[test]
    fn lies_are_refused() {
        let tensor = |shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        for (json, data) in [
            (String::new(), 0),
            ("[]".into(), 0),
            ("{".into(), 0),
            ("{\"a\":1}".into(), 0),
            (tensor("[2]", "[0,8]"), 4),
            (tensor("[2]", "[0,8]"), 12),
            (tensor("[3]", "[0,8]"), 8),
            (tensor("[2]", "[8,0]"), 8),
            (tensor("[2]", "[4,12]"), 12),
            (tensor("[-1]", "[0,8]"), 8),
            (
                tensor("[9223372036854775807,9223372036854775807]", "[0,8]"),
                8,
            ),
            (tensor("[2]", "[0,18446744073709551615]"), 8),
            (r#"{"__metadata__":{"a":1}}"#.into(), 0),
            (r#"{"__metadata__":{"a":"1","a":"2"}}"#.into(), 0),
            (r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0),
            (
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
                    "b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#
                    .into(),
                6,
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},
                    "a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#
                    .into(),
                0,
            ),
        ] {
            assert!(check(&json, data).is_err(), "{json} {data}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_header_or_an_error(
            flips in proptest::collection::vec(
                (proptest::prelude::any::<proptest::sample::Index>(), proptest::prelude::any::<u8>()), 0..6,
            ),
            wild in proptest::option::of(proptest::collection::vec(proptest::prelude::any::<u8>(), 0..80)),
            data in 0u64..64,
        ) {
            let good = br#"{"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"__metadata__":{"k":"v"},
                "b":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}}"#;
            let mut json = wild.unwrap_or_else(|| good.to_vec());
            for (at, value) in flips {
                if !json.is_empty() {
                    let at = at.index(json.len());
                    json[at] = value;
                }
            }
            let len = 8 + json.len() as u64 + data;
            if let Ok(header) = parse(&json, len) {
                for tensor in header.tensors {
                    assert!(tensor.span.0 <= tensor.span.1 && tensor.span.1 <= len);
                }
            }
        }
    }

    #[test]
    fn what_we_write_the_safetensors_crate_reads() {
        let metadata = BTreeMap::from([("quo\"te".to_string(), "n\nl".to_string())]);
        let tensors = [
            ("a\\b", "BF16", vec![2, 3], 12),
            ("c", "BF16", vec![2, 0], 0),
        ];
        let mut file = write(&tensors, &metadata);
        assert_eq!(file.len() % 8, 0);
        file.extend([0u8; 12]);
        let read = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!(read.tensor("a\\b").unwrap().shape(), [2, 3]);
        let json_len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let own = parse(&file[8..8 + json_len], file.len() as u64).unwrap();
        assert_eq!(own.metadata, metadata);
    }
}
