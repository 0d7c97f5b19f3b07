//! Properties of the clustering, the silhouettes and the probe that hold for any input.

use half::{bf16, f16};
use nest_rs::kmeans::{Init, Metric, predict};
use nest_rs::silhouette::{Distance, silhouettes_with};
use nest_rs::{Error, KMeans, Matrix, Probe, Workers, select_rows};
use proptest::prelude::*;

/// A matrix of ordinary numbers with some rows repeated.
fn matrix() -> impl Strategy<Value = (Vec<f32>, usize, usize)> {
    (1usize..120, 1usize..300, any::<u64>()).prop_map(|(n, d, seed)| {
        let mut state = seed | 1;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        };
        let mut x: Vec<f32> = (0..n * d).map(|_| next()).collect();
        for i in (3..n).step_by(5) {
            let from = (i / 2) * d;
            x.copy_within(from..from + d, i * d);
        }
        (x, n, d)
    })
}

fn square(a: &[f32], b: &[f32]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2))
        .sum()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    #[test]
    fn every_row_is_with_its_nearest_center((x, n, d) in matrix(), k in 1usize..12, seed: u64) {
        let k = k.min(n);
        let view = Matrix::new(&x, n, d).unwrap();
        let fit = KMeans::new(k).seed(seed).fit(&view).unwrap();
        let mut inertia = 0.0;
        for (row, &label) in x.chunks(d).zip(&fit.labels) {
            let own = square(row, &fit.centers[label as usize * d..][..d]);
            inertia += own;
            for center in fit.centers.chunks(d) {
                prop_assert!(own <= square(row, center) + 1e-4 * (1.0 + own));
            }
        }
        prop_assert!((fit.inertia - inertia).abs() <= 1e-4 * inertia + 1e-6 * (n * d) as f64);
        let again = predict(&view, &fit.centers, Metric::Euclidean, &Workers::new(None).unwrap());
        for ((row, &a), &b) in x.chunks(d).zip(&fit.labels).zip(&again.unwrap()) {
            // Equal but for ties.
            let at = |c: i32| square(row, &fit.centers[c as usize * d..][..d]);
            prop_assert!(a == b || (at(a) - at(b)).abs() < 1e-4 * (1.0 + at(a)));
        }
    }

    #[test]
    fn threads_change_no_bit((x, n, d) in matrix(), k in 2usize..9, cosine: bool) {
        let k = k.min(n);
        let view = Matrix::new(&x, n, d).unwrap();
        let metric = if cosine { Metric::Cosine } else { Metric::Euclidean };
        let settings = KMeans::new(k).metric(metric).n_init(3);
        let one = settings.clone().n_threads(Some(1)).fit(&view).unwrap();
        for threads in [2, 8] {
            prop_assert_eq!(&one, &settings.clone().n_threads(Some(threads)).fit(&view).unwrap());
        }
        if one.n_used >= 2 && one.n_used < n {
            for distance in [Distance::Euclidean, Distance::SqEuclidean, Distance::Cosine] {
                let of = |threads| {
                    let workers = Workers::new(Some(threads)).unwrap();
                    silhouettes_with(&view, &[&one.labels], distance, &workers).unwrap()
                };
                prop_assert_eq!(of(1), of(8));
            }
        }
        let y: Vec<u8> = (0..n).map(|i| (i % 2) as u8).collect();
        if n >= 2 {
            let probe = Probe::new().n_threads(Some(1)).fit(&view, &y).unwrap();
            prop_assert!(probe.converged);
            prop_assert_eq!(&probe, &Probe::new().n_threads(Some(8)).fit(&view, &y).unwrap());
        }
    }

    #[test]
    fn silhouettes_are_the_definition((x, n, d) in matrix(), k in 2usize..6) {
        prop_assume!(n > k);
        let labels: Vec<i32> = (0..n).map(|i| ((i * i + i / 3) % k) as i32 - 3).collect();
        let mut names = labels.clone();
        names.sort_unstable();
        names.dedup();
        prop_assume!(names.len() >= 2);
        let row = |i: usize| &x[i * d..(i + 1) * d];
        let view = Matrix::new(&x, n, d).unwrap();
        let got = nest_rs::silhouette(&view, &labels, Distance::Euclidean).unwrap();
        for i in 0..n {
            let mean = |name: i32| {
                let others: Vec<f64> = (0..n)
                    .filter(|&j| j != i && labels[j] == name)
                    .map(|j| square(row(i), row(j)).sqrt())
                    .collect();
                others.iter().sum::<f64>() / others.len() as f64
            };
            let size = labels.iter().filter(|&&l| l == labels[i]).count();
            let want = if size == 1 {
                0.0
            } else {
                let a = mean(labels[i]);
                let b = names
                    .iter()
                    .filter(|&&name| name != labels[i])
                    .map(|&name| mean(name))
                    .fold(f64::INFINITY, f64::min);
                if a.max(b) > 0.0 { (b - a) / a.max(b) } else { 0.0 }
            };
            prop_assert!((got.samples[i] - want).abs() < 1e-6, "{} {}", got.samples[i], want);
        }
    }

    #[test]
    fn any_bits_give_a_result_or_an_error(
        bits in prop::collection::vec(any::<u32>(), 1..200), d in 1usize..8, k in 0usize..9,
    ) {
        let n = bits.len() / d;
        prop_assume!(n > 0);
        let x: Vec<f32> = bits[..n * d].iter().map(|&b| f32::from_bits(b)).collect();
        let halves: Vec<f16> = bits[..n * d].iter().map(|&b| f16::from_bits(b as u16)).collect();
        let brains: Vec<bf16> = bits[..n * d].iter().map(|&b| bf16::from_bits(b as u16)).collect();
        let views = [
            Matrix::new(&x, n, d).unwrap(),
            Matrix::new(&halves[..], n, d).unwrap(),
            Matrix::new(&brains[..], n, d).unwrap(),
        ];
        for view in views {
            for metric in [Metric::Euclidean, Metric::Cosine] {
                match KMeans::new(k).metric(metric).fit(&view) {
                    Ok(fit) => {
                        prop_assert!(fit.centers.iter().all(|v| v.is_finite()));
                        prop_assert!(fit.inertia.is_finite() && fit.inertia >= 0.0);
                        prop_assert!(fit.labels.iter().all(|&l| (l as usize) < k));
                    }
                    Err(Error::NonFinite { .. } | Error::Argument { .. }) => {}
                    Err(other) => prop_assert!(false, "{}", other),
                }
            }
            let labels: Vec<i32> = (0..n).map(|i| (i % 2) as i32).collect();
            for distance in [Distance::Euclidean, Distance::SqEuclidean, Distance::Cosine] {
                if let Ok(scores) = nest_rs::silhouette(&view, &labels, distance) {
                    prop_assert!(scores.samples.iter().all(|s| (-1.0..=1.0).contains(s)));
                }
            }
        }
    }

    #[test]
    fn selection_is_sorted_and_above_the_threshold(
        coef in prop::collection::vec(-1e3f64..1e3, 0..200), z in -1f64..4.0, positive: bool,
    ) {
        let rows = select_rows(&coef, z, positive).unwrap();
        prop_assert!(rows.windows(2).all(|w| w[0] < w[1]));
        if positive {
            prop_assert!(rows.iter().all(|&r| coef[r as usize] > 0.0));
        }
    }
}

#[test]
fn given_centers_are_used() {
    let x = [0.0f32, 1.0, 10.0, 11.0];
    let fit = KMeans::new(2)
        .init(Init::Centers(vec![10.0, 0.0]))
        .fit(&Matrix::new(&x[..], 4, 1).unwrap())
        .unwrap();
    assert_eq!(fit.labels, [1, 1, 0, 0]);
    assert_eq!(fit.centers, [10.5, 0.5]);
    assert_eq!(fit.inertia, 1.0);
}

#[test]
fn a_sweep_refuses_given_centers() {
    let x = [0.0f32, 1.0, 2.0];
    let x = Matrix::new(&x[..], 3, 1).unwrap();
    let swept = KMeans::new(2)
        .init(Init::Centers(vec![0.0, 1.0]))
        .sweep(&x, &[2], 1);
    assert!(matches!(swept, Err(Error::Argument { name: "init", .. })));
}
