//! Greedy k-means++ seeding, several runs in one pass over the rows.
//!
//! Each step draws a few candidates with probability in proportion to D^2, the squared distance to the
//! nearest centre chosen so far, and keeps the one that lowers the sum of D^2 most. Done literally, that is a
//! pass over all rows for each of k steps, and memory bandwidth decides its speed. Instead a pool of
//! candidates for several steps is drawn at once, and their distances to all rows are computed in one
//! pass, with the pools of all other runs. A later step takes a pooled candidate y with probability
//! D^2(y) now / D^2(y) when drawn, which is at most 1 since D^2 only shrinks: rejection sampling, so its
//! candidates have exactly the distribution of D^2 now. The unused rest of a pool is independent of
//! the choices made, and serves the next step.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::error::Result;
use crate::kernel::{BLOCK, Form, Packed, Rows, Scratch, tile, vector};
use crate::pairs::Pairs;
use crate::points::Points;
use crate::pool::Workers;

/// Rows whose potentials are summed together: part of the bits.
const CHUNK: usize = 8 * BLOCK;
/// Candidates a pool holds at most. Part of the bits.
const POOL: usize = 64;
/// Distances that the pools of one pass may hold: 48 MB, but at least one step of one run. Part of the
/// bits, as it limits a pool.
const BUDGET: usize = 12 << 20;

/// Uniform in [0, 1), 53 bits.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// The rows chosen as first centres, for each `(k, restart)`. `pairs` are the distances of `points`,
/// where they are known already: they change no bit.
pub(super) fn plus_plus(
    points: &Points,
    pairs: Option<&Pairs>,
    jobs: &[(usize, usize)],
    seed: u64,
    workers: &Workers,
) -> Result<Vec<Vec<usize>>> {
    let n = points.rows();
    let together = match pairs {
        Some(_) => jobs.len(),
        None => BUDGET / (n * POOL),
    };
    let mut chosen = Vec::with_capacity(jobs.len());
    for jobs in jobs.chunks(together.max(1)) {
        let mut runs: Vec<Run> = jobs
            .iter()
            .map(|&(k, restart)| Run::new(n, k, seed, restart as u64))
            .collect();
        loop {
            let open = runs.iter().filter(|run| !run.is_done()).count();
            if open == 0 {
                break;
            }
            if pairs.is_none() {
                measure(points, &mut runs, workers)?;
            }
            if open > 1 {
                let serial = workers.serial();
                let steps = workers.map_mut(&mut runs, |run| run.advance(pairs, &serial))?;
                steps.into_iter().collect::<Result<()>>()?;
            } else {
                for run in &mut runs {
                    run.advance(pairs, workers)?;
                }
            }
        }
        chosen.extend(runs.into_iter().map(|run| run.chosen));
    }
    Ok(chosen)
}

/// One seeding under way.
struct Run {
    k: usize,
    trials: usize,
    rng: ChaCha8Rng,
    chosen: Vec<usize>,
    /// D^2 of each row, and its sums over chunks of rows.
    squares: Vec<f32>,
    sums: Vec<f64>,
    /// Candidates: the row, and its D^2 when drawn.
    pool: Vec<(usize, f32)>,
    next: usize,
    /// Squared distances to the candidates: for each chunk of rows, one run a candidate.
    columns: Vec<f32>,
    /// Of the present step: candidates tried, and the best potential with its distances.
    tried: usize,
    best: Option<(f64, usize)>,
    best_column: Vec<f32>,
}

impl Run {
    fn new(n: usize, k: usize, seed: u64, restart: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(restart);
        let first = ((uniform(&mut rng) * n as f64) as usize).min(n - 1);
        Run {
            k,
            trials: 2 + (k as f64).ln() as usize,
            rng,
            chosen: Vec::with_capacity(k),
            squares: vec![f32::INFINITY; n],
            sums: vec![f64::INFINITY; n.div_ceil(CHUNK)],
            pool: vec![(first, f32::INFINITY)],
            next: 0,
            columns: Vec::new(),
            tried: 0,
            best: None,
            best_column: Vec::new(),
        }
    }

    fn is_done(&self) -> bool {
        self.chosen.len() >= self.k
    }

    /// Goes on until the pool is used up, and draws the next one.
    fn advance(&mut self, pairs: Option<&Pairs>, workers: &Workers) -> Result<()> {
        while !self.is_done() {
            workers.check()?;
            if self.chosen.is_empty() {
                self.next = 1;
                self.best = Some((0.0, self.pool[0].0));
                self.keep(pairs, 0);
                self.commit(workers)?;
                continue;
            }
            if self.sums.iter().sum::<f64>() <= 0.0 {
                // Every row coincides with a centre. Further centres stay empty; take any row.
                self.chosen.push(self.chosen.len() % self.squares.len());
                continue;
            }
            let mut accepted = Vec::new();
            while self.tried + accepted.len() < self.trials && self.next < self.pool.len() {
                let (row, drawn) = self.pool[self.next];
                if uniform(&mut self.rng) * f64::from(drawn) < f64::from(self.squares[row]) {
                    accepted.push(self.next);
                }
                self.next += 1;
            }
            self.tried += accepted.len();
            self.judge(pairs, &accepted, workers)?;
            if self.tried == self.trials {
                self.commit(workers)?;
            } else {
                self.draw();
                if pairs.is_none() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The distances of a chunk of rows to a candidate.
    fn column<'s>(&'s self, pairs: Option<&'s Pairs>, chunk: usize, candidate: usize) -> &'s [f32] {
        let from = chunk * CHUNK;
        let len = CHUNK.min(self.squares.len() - from);
        match pairs {
            Some(pairs) => &pairs.row(self.pool[candidate].0)[from..from + len],
            None => &self.columns[from * self.pool.len() + candidate * len..][..len],
        }
    }

    /// Keeps the distances of the best candidate, whatever becomes of the pool.
    fn keep(&mut self, pairs: Option<&Pairs>, candidate: usize) {
        let mut column = std::mem::take(&mut self.best_column);
        column.clear();
        for chunk in 0..self.sums.len() {
            column.extend_from_slice(self.column(pairs, chunk, candidate));
        }
        self.best_column = column;
    }

    /// Sums D^2 as it would be with each of the candidates.
    fn judge(
        &mut self,
        pairs: Option<&Pairs>,
        candidates: &[usize],
        workers: &Workers,
    ) -> Result<()> {
        let this = &*self;
        let sums = workers.map(this.sums.len(), |chunk| {
            let from = chunk * CHUNK;
            candidates
                .iter()
                .map(|&c| {
                    let column = this.column(pairs, chunk, c);
                    vector::sum_of_smaller(&this.squares[from..from + column.len()], column)
                })
                .collect::<Vec<f64>>()
        })?;
        let mut best = None;
        for (at, &c) in candidates.iter().enumerate() {
            let potential: f64 = sums.iter().map(|sums| sums[at]).sum();
            if self.best.is_none_or(|(least, _)| potential < least) {
                self.best = Some((potential, self.pool[c].0));
                best = Some(c);
            }
        }
        if let Some(c) = best {
            self.keep(pairs, c);
        }
        Ok(())
    }

    /// Takes the best candidate.
    fn commit(&mut self, workers: &Workers) -> Result<()> {
        let parts = self
            .squares
            .chunks_mut(CHUNK)
            .zip(self.best_column.chunks(CHUNK))
            .zip(&mut self.sums);
        workers.each(parts, |((squares, column), sum)| {
            *sum = vector::take_smaller(squares, column);
        })?;
        if let Some((_, row)) = self.best.take() {
            self.chosen.push(row);
        }
        self.tried = 0;
        Ok(())
    }

    /// Fills the pool: the longer the seeding has gone, the less a step changes D^2, and the longer a pool
    /// stays good.
    fn draw(&mut self) {
        let most = POOL.min(BUDGET / self.squares.len()) / self.trials;
        let steps = (self.chosen.len() / 4).clamp(1, most.max(1));
        let size = self.trials * steps;
        let total: f64 = self.sums.iter().sum();
        self.pool.clear();
        self.next = 0;
        for _ in 0..size {
            let target = uniform(&mut self.rng) * total;
            let row = self.locate(target);
            self.pool.push((row, self.squares[row]));
        }
    }

    /// The row at which the running sum of D^2 passes `target`.
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

/// Computes the distances of all rows to the candidates of all open runs, in one pass.
fn measure(points: &Points, runs: &mut [Run], workers: &Workers) -> Result<()> {
    let (n, d) = (points.rows(), points.dim());
    let mut open: Vec<&mut Run> = runs.iter_mut().filter(|run| !run.is_done()).collect();
    let sizes: Vec<usize> = open.iter().map(|run| run.pool.len()).collect();
    let candidates: Vec<usize> = open
        .iter()
        .flat_map(|run| run.pool.iter().map(|&(row, _)| row))
        .collect();
    let columns = Packed::new(&(&points.gather(&candidates)[..], d), 0..candidates.len());
    // The part of every run's columns that a chunk of rows fills.
    let mut parts: Vec<Vec<&mut [f32]>> = Vec::new();
    parts.resize_with(n.div_ceil(CHUNK), Vec::new);
    for run in &mut open {
        let size = run.pool.len();
        run.columns.resize(n * size, 0.0);
        for (part, columns) in parts.iter_mut().zip(run.columns.chunks_mut(CHUNK * size)) {
            part.push(columns);
        }
    }
    workers.each_with(
        parts.into_iter().enumerate(),
        Scratch::default,
        |scratch, (chunk, mut parts)| {
            let from = chunk * CHUNK;
            let end = (from + CHUNK).min(n);
            for start in (from..end).step_by(BLOCK) {
                let rows = start..(start + BLOCK).min(end);
                let form = Form::SquaredDistance;
                let out = tile(form, points, rows.clone(), &columns, scratch);
                let mut first = 0;
                for (part, size) in parts.iter_mut().zip(&sizes) {
                    for (c, column) in part.chunks_exact_mut(end - from).enumerate() {
                        let column = &mut column[start - from..rows.end - from];
                        let products = out[first + c..].iter().step_by(columns.padded());
                        column.iter_mut().zip(products).for_each(|(to, &v)| *to = v);
                    }
                    first += size;
                }
            }
        },
    )
}
