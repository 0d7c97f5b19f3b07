//! Greedy k-means++ seeding.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::error::Result;
use crate::kernel::{BLOCK, Form, Packed, Rows, Scratch, tile};
use crate::points::Points;
use crate::pool::Workers;

/// Rows whose potentials are summed together: part of the bits.
const CHUNK: usize = 8 * BLOCK;

/// Uniform in [0, 1), 53 bits.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Squared distances from every row to the nearest chosen centre.
struct Nearest {
    squares: Vec<f32>,
    /// Sums over chunks of rows.
    sums: Vec<f64>,
}

impl Nearest {
    fn total(&self) -> f64 {
        self.sums.iter().sum()
    }

    /// The row at which the running sum passes `target`: drawn in proportion to the distances.
    fn locate(&self, target: f64) -> usize {
        let mut passed = 0.0;
        let mut last = 0;
        for (c, &sum) in self.sums.iter().enumerate() {
            if passed + sum <= target {
                passed += sum;
                continue;
            }
            let from = c * CHUNK;
            let to = (from + CHUNK).min(self.squares.len());
            for i in from..to {
                let square = f64::from(self.squares[i]);
                if square > 0.0 {
                    last = i;
                    passed += square;
                    if passed > target {
                        return i;
                    }
                }
            }
        }
        // Rounding left the target beyond the end.
        last
    }
}

/// The first centres, `[k, d]` in the coordinates of the points.
pub(super) fn plus_plus(
    points: &Points,
    k: usize,
    seed: u64,
    restart: u64,
    workers: &Workers,
) -> Result<Vec<f32>> {
    let n = points.rows();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(restart);
    let trials = 2 + (k as f64).ln() as usize;

    let mut chosen = vec![((uniform(&mut rng) * n as f64) as usize).min(n - 1)];
    let mut nearest = Nearest {
        squares: vec![f32::INFINITY; n],
        sums: Vec::new(),
    };
    let mut trial_squares = Vec::new();
    try_centres(points, &chosen, &mut nearest, &mut trial_squares, workers)?;
    while chosen.len() < k {
        let total = nearest.total();
        if total <= 0.0 {
            // Every row coincides with a centre. Further centres stay empty; take any row.
            chosen.push(chosen.len() % n);
            continue;
        }
        let mut candidates: Vec<usize> = (0..trials)
            .map(|_| nearest.locate(uniform(&mut rng) * total))
            .collect();
        candidates.sort_unstable();
        candidates.dedup();
        let best = try_centres(
            points,
            &candidates,
            &mut nearest,
            &mut trial_squares,
            workers,
        )?;
        chosen.push(candidates[best]);
    }
    Ok(points.gather(&chosen))
}

/// Finds which candidate lowers the sum of squared distances most, and moves `nearest` there.
fn try_centres(
    points: &Points,
    candidates: &[usize],
    nearest: &mut Nearest,
    trial_squares: &mut Vec<f32>,
    workers: &Workers,
) -> Result<usize> {
    let (n, d, t) = (points.rows(), points.dim(), candidates.len());
    let columns = Packed::new(&(&points.gather(candidates)[..], d), 0..t);
    // For each chunk of rows, one run of distances a candidate.
    trial_squares.resize(n * t, 0.0);
    let mut sums = vec![0.0f64; n.div_ceil(CHUNK) * t];
    let jobs = trial_squares
        .chunks_mut(CHUNK * t)
        .zip(sums.chunks_mut(t))
        .enumerate();
    let squares = &nearest.squares;
    workers.each_with(jobs, Scratch::default, |scratch, (chunk, (trial, sums))| {
        let from = chunk * CHUNK;
        let len = trial.len() / t;
        for start in (0..len).step_by(BLOCK) {
            let rows = from + start..from + (start + BLOCK).min(len);
            let out = tile(
                Form::SquaredDistance,
                points,
                rows.clone(),
                rows.end..(rows.end + BLOCK).min(from + len),
                &columns,
                scratch,
            );
            for (i, row) in rows.zip(out.chunks_exact(columns.padded())) {
                for c in 0..t {
                    let square = row[c].min(squares[i]);
                    trial[c * len + i - from] = square;
                    sums[c] += f64::from(square);
                }
            }
        }
    })?;

    let total = |c: usize| sums.iter().skip(c).step_by(t).sum::<f64>();
    let mut best = (0, total(0));
    for c in 1..t {
        let sum = total(c);
        if sum < best.1 {
            best = (c, sum);
        }
    }
    let best = best.0;
    for (chunk, trial) in trial_squares.chunks(CHUNK * t).enumerate() {
        let len = trial.len() / t;
        nearest.squares[chunk * CHUNK..chunk * CHUNK + len]
            .copy_from_slice(&trial[best * len..(best + 1) * len]);
    }
    nearest.sums = sums.iter().skip(best).step_by(t).copied().collect();
    Ok(best)
}
