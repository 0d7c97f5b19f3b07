//! Speed of the pieces on this machine: `cargo bench`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use nest_rs::activations::masked_max;
use nest_rs::kmeans::{Init, Metric, predict};
use nest_rs::silhouette::Distance;
use nest_rs::{KMeans, Matrix, Probe, Workers, silhouette};

fn noise(n: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

fn assignment(c: &mut Criterion) {
    let (n, d, k) = (20_000, 1000, 256);
    let (x, centers) = (noise(n * d), noise(k * d));
    let x = Matrix::new(&x, n, d).unwrap();
    let mut group = c.benchmark_group("assignment");
    // One product and one addition a coordinate.
    group.throughput(Throughput::Elements((2 * n * d * k) as u64));
    group.sample_size(10);
    for threads in [1, 2] {
        let workers = Workers::new(Some(threads)).unwrap();
        group.bench_function(format!("20k x 1000, k 256, {threads} threads"), |b| {
            b.iter(|| predict(&x, black_box(&centers), Metric::Euclidean, &workers).unwrap());
        });
    }
}

fn lloyd(c: &mut Criterion) {
    let (n, d, k) = (20_000, 200, 64);
    let x = noise(n * d);
    let fit = KMeans::new(k).max_iter(10).tol(0.0);
    let given = fit.clone().init(Init::Centers(x[..k * d].to_vec()));
    let x = Matrix::new(&x, n, d).unwrap();
    let mut group = c.benchmark_group("k-means");
    group.sample_size(10);
    group.bench_function("10 iterations of 20k x 200, k 64", |b| {
        b.iter(|| given.fit(black_box(&x)).unwrap());
    });
    group.bench_function("seeding and 10 iterations", |b| {
        b.iter(|| fit.fit(black_box(&x)).unwrap());
    });
}

fn scores(c: &mut Criterion) {
    let (n, d, k) = (4000, 512, 32);
    let x = noise(n * d);
    let x = Matrix::new(&x, n, d).unwrap();
    let labels: Vec<i32> = (0..n).map(|i| (i % k) as i32).collect();
    let mut group = c.benchmark_group("silhouette");
    group.sample_size(10);
    for distance in [Distance::Euclidean, Distance::SqEuclidean, Distance::Cosine] {
        group.bench_function(format!("{distance:?} 4k x 512, k 32"), |b| {
            b.iter(|| silhouette(black_box(&x), &labels, distance).unwrap());
        });
    }
}

fn probe(c: &mut Criterion) {
    let (n, d) = (1000, 4096);
    let x = noise(n * d);
    let y: Vec<u8> = (0..n).map(|i| (i % 2) as u8).collect();
    let x = Matrix::new(&x, n, d).unwrap();
    let mut group = c.benchmark_group("probe");
    group.sample_size(10);
    group.bench_function("1000 x 4096", |b| {
        b.iter(|| Probe::new().fit(black_box(&x), &y).unwrap());
    });
}

fn pooling(c: &mut Criterion) {
    let (batch, tokens, d) = (32, 128, 8192);
    let x: Vec<bf16> = noise(batch * tokens * d)
        .into_iter()
        .map(bf16::from_f32)
        .collect();
    let mask = vec![1u8; batch * tokens];
    let x = Matrix::new(&x[..], batch * tokens, d).unwrap();
    let workers = Workers::new(None).unwrap();
    let mut group = c.benchmark_group("pooling");
    group.throughput(Throughput::Bytes((batch * tokens * d * 2) as u64));
    group.sample_size(20);
    group.bench_function("32 x 128 x 8192 bf16", |b| {
        b.iter(|| masked_max(black_box(&x), &mask, tokens, &workers).unwrap());
    });
}

criterion_group!(benches, assignment, lloyd, scores, probe, pooling);
criterion_main!(benches);
