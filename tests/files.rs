//! Stores and folds on real files, honest and hostile.

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use nest_rs::activations::masked_max;
use nest_rs::fold::{Edit, fold_file, read_header, tensor_sha256};
use nest_rs::{ActivationStore, Dtype, Error, Matrix, Probe, Workers};
use proptest::prelude::*;

fn small_store(path: &Path) -> ActivationStore {
    let sites = [("a".to_string(), 3), ("b".to_string(), 2)];
    let metadata = BTreeMap::from([("labels".to_string(), "01".to_string())]);
    let mut writer = ActivationStore::create(path, &sites, 4, Dtype::Bf16, metadata).unwrap();
    let a: Vec<f32> = (0..12).map(|i| (i * i % 7) as f32).collect();
    let b: Vec<f32> = (0..8).map(|i| i as f32 - 3.0).collect();
    writer
        .write("b", 0, &Matrix::new(&b, 4, 2).unwrap())
        .unwrap();
    writer
        .write("a", 2, &Matrix::new(&a[6..], 2, 3).unwrap())
        .unwrap();
    writer
        .write("a", 0, &Matrix::new(&a[..6], 2, 3).unwrap())
        .unwrap();
    writer.finish().unwrap()
}

#[test]
fn a_store_is_read_by_the_safetensors_crate() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let store = small_store(&path);
    let bytes = std::fs::read(&path).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.tensor("a").unwrap().shape(), [4, 3]);
    let first = theirs.tensor("b").unwrap().data()[..2].to_vec();
    assert_eq!(bf16::from_le_bytes([first[0], first[1]]).to_f32(), -3.0);
    assert_eq!(
        store.columns("b", &[1], false).unwrap(),
        [-2.0, 0.0, 2.0, 4.0]
    );
    assert_eq!(store.metadata()["labels"], "01");

    let workers = Workers::new(Some(2)).unwrap();
    let fits = Probe::new()
        .fit_store(&store, &[0, 0, 1, 1], None, &workers)
        .unwrap();
    let alone = Probe::new()
        .fit(&store.site("b").unwrap(), &[0, 0, 1, 1])
        .unwrap();
    assert_eq!(fits[1], ("b".to_string(), alone));
}

#[test]
fn the_first_bad_site_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    drop(small_store(&path));
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..end - 2].copy_from_slice(&bf16::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let store = ActivationStore::open(&path).unwrap();
    let workers = Workers::new(None).unwrap();
    let error = Probe::new()
        .fit_store(&store, &[0, 0, 1, 1], None, &workers)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "site `b` holds the non-finite value `NaN` in row `3`, column `0`"
    );
    assert!(store.columns("b", &[0], true).is_err());
    assert!(store.columns("b", &[1], true).is_ok());
}

#[test]
fn a_fold_comes_off_by_the_opposite_in_f32_where_sums_are_exact() {
    let folder = tempfile::tempdir().unwrap();
    let (src, dst) = (folder.path().join("src"), folder.path().join("dst"));
    drop(small_store(&src));
    let edit = |sign: f32| {
        let edit = Edit {
            rows: vec![3, 1],
            cluster: vec![0, 1],
            delta: [1.0f32, 2.0, 0.5, -4.0, 0.0, 8.0]
                .map(|v| v * sign)
                .to_vec(),
            k: 2,
        };
        BTreeMap::from([("a".to_string(), edit)])
    };
    let there = fold_file(&src, &dst, &edit(1.0)).unwrap();
    assert_ne!(std::fs::read(&src).unwrap(), std::fs::read(&dst).unwrap());
    assert_eq!(there["a"].changed, 5);
    let back = fold_file(&dst, &dst, &edit(-1.0)).unwrap();
    assert_eq!(std::fs::read(&src).unwrap(), std::fs::read(&dst).unwrap());
    assert_eq!(there["a"].sha256_before, back["a"].sha256_after);
    assert_eq!(read_header(&src).unwrap(), read_header(&dst).unwrap());
    let hashes = tensor_sha256(&src, None).unwrap();
    assert_eq!(hashes["a"], there["a"].sha256_before);
}

#[test]
fn a_failed_fold_leaves_the_target_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (src, dst) = (folder.path().join("src"), folder.path().join("dst"));
    drop(small_store(&src));
    std::fs::write(&dst, b"precious").unwrap();
    let edit = Edit {
        rows: vec![4],
        cluster: vec![0],
        delta: vec![0.0; 3],
        k: 1,
    };
    let failed = fold_file(&src, &dst, &BTreeMap::from([("a".to_string(), edit)]));
    assert!(matches!(failed, Err(Error::Tensor { .. })));
    assert_eq!(std::fs::read(&dst).unwrap(), b"precious");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_damaged_file_is_an_error_or_a_store_never_a_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        drop(small_store(&path));
        let mut bytes = std::fs::read(&path).unwrap();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        std::fs::write(&path, &bytes).unwrap();
        let _ = read_header(&path);
        // What the safetensors crate refuses is no store.
        if safetensors::SafeTensors::deserialize(&bytes).is_err() {
            prop_assert!(ActivationStore::open(&path).is_err());
        }
        if let Ok(store) = ActivationStore::open(&path) {
            for site in store.sites() {
                let x = store.site(&site.name).unwrap();
                prop_assert_eq!(x.cols(), site.width);
                let _ = store.columns(&site.name, &[0], true);
            }
        }
    }

    #[test]
    fn pooling_any_bits_gives_the_maximum_or_an_error(
        bits in prop::collection::vec(any::<u16>(), 24), mask in prop::collection::vec(0u8..2, 6),
    ) {
        let x: Vec<bf16> = bits.iter().map(|&b| bf16::from_bits(b)).collect();
        let view = Matrix::new(&x[..], 6, 4).unwrap();
        let kept = |b: usize| (b * 3..b * 3 + 3).filter(|&t| mask[t] == 1);
        match masked_max(&view, &mask, 3, &Workers::new(Some(1)).unwrap()) {
            Ok(pooled) => {
                let want: Vec<f32> = (0..8)
                    .map(|j| kept(j / 4).map(|t| x[t * 4 + j % 4].to_f32()).fold(f32::NAN, f32::max))
                    .collect();
                let nest_rs::Values::Bf16(got) = pooled.values() else { panic!() };
                for (g, w) in got.iter().zip(&want) {
                    prop_assert_eq!(g.to_f32(), *w);
                }
            }
            Err(Error::AllMasked(b)) => prop_assert_eq!(kept(b).count(), 0),
            Err(Error::NonFinite { row, .. }) => {
                prop_assert!(kept(row).any(|t| x[t * 4..t * 4 + 4].iter().any(|v| !v.is_finite())));
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
