//! The nearest centre of each row, without computing most of the distances.
//!
//! Labels are defined by f32 arithmetic: the first smallest `bias - chain(x, c)`. Two things spare most
//! of it and change no label.
//!
//! *Screening* ([`crate::kernel::screen`]): products with a proven error bound, in bfloat16 where the
//! processor has it, decide all but close calls; those few pairs are computed as defined.
//!
//! *Bounds*, as Hamerly's: each row keeps an upper bound u on the distance to its centre and a lower
//! bound l on that to any other. When centres drift, u grows by the drift of its own and l shrinks by
//! the largest of the others. While l is above u by more than f32 could confuse, the row stays. Few centres
//! may drift far while most rest: those few are set apart, l shrinks only by the drift of the rest, and
//! rows are compared with the few alone. How many is chosen anew each time, by the least work.
//!
//! With `h = |c|^2 / 2 - bias` (0 but for unit vectors), `score = (|x - c|^2 - |x|^2) / 2 - h`: so
//! `l^2 - u^2 > 2 (2 E + max h - min h)`, E the largest error of an f32 score, proves that no computed
//! score is as small as the present centre's.

use std::sync::OnceLock;

use crate::error::Result;
use crate::kernel::{
    BLOCK, CHAINS, Form, Kept, Packed, Rows, Scratch, Screen, chains, screen, tile, vector,
};
use crate::points::Points;
use crate::pool::Workers;

/// Close calls a row may have before all its scores are computed in f32.
const MANY: usize = 12;
/// Relative slack for bounds kept in f32 and distances summed in f64 of f32 differences.
const SLACK: f64 = 1e-6;
/// Rows looked at to choose which centres to set apart.
const SAMPLE: usize = 4096;

/// The labels of the rows, and what is known of their distances.
pub(super) struct Assignment<'a, 'x> {
    points: &'a Points<'x>,
    kept: &'a Kept,
    pub labels: Vec<i32>,
    known: Vec<Known>,
}

/// Bounds of one row.
#[derive(Clone, Copy, Default)]
struct Known {
    /// Of the distance to its own centre, from above.
    upper: f32,
    /// Of the distance to any other, from below.
    lower: f32,
    /// Of its norm, from above.
    norm: f32,
}

fn up(x: f64) -> f32 {
    (x as f32).next_up()
}

fn down(x: f64) -> f32 {
    (x as f32).next_down()
}

/// `bias[c]` of the scores: half the squared norm, or 0 where all norms are 1.
pub(super) fn biases(points: &Points, centers: &[f32]) -> Vec<f32> {
    centers
        .chunks_exact(points.dim())
        .map(|c| {
            if points.is_unit() {
                0.0
            } else {
                (0.5 * vector::square_norm(c)) as f32
            }
        })
        .collect()
}

/// What all tasks of one assignment share.
struct Plan<'a> {
    centers: &'a [f32],
    bias: Vec<f32>,
    all: Screen,
    /// The centres set apart: their screen, their numbers, and the place of each centre among them.
    apart: Option<(Screen, Vec<u32>, Vec<u32>)>,
    /// How far each centre went, and how far the rest went at most.
    drift: Vec<f64>,
    rest: f64,
    /// Largest norm of a centre; smallest and largest h.
    norm: f64,
    h: (f64, f64),
    exact: OnceLock<Packed>,
}

/// Memory of one worker.
#[derive(Default)]
struct Work {
    screen: screen::Scratch,
    exact: Scratch,
    row: Vec<f32>,
    full: Vec<u32>,
    part: Vec<u32>,
    hard: Vec<u32>,
    pairs: Vec<(usize, usize)>,
}

impl<'a, 'x> Assignment<'a, 'x> {
    /// Nothing known yet.
    pub fn new(points: &'a Points<'x>, kept: &'a Kept) -> Self {
        Assignment {
            points,
            kept,
            labels: vec![-1; points.rows()],
            known: vec![Known::default(); points.rows()],
        }
    }

    /// Assigns every row anew.
    pub fn assign(&mut self, centers: &[f32], workers: &Workers) -> Result<()> {
        let plan = self.plan(centers, Vec::new());
        self.run(&plan, workers)
    }

    /// Assigns after the centres went by `drift`, from where the labels were last assigned.
    pub fn reassign(&mut self, centers: &[f32], drift: Vec<f64>, workers: &Workers) -> Result<()> {
        let plan = self.plan(centers, drift);
        self.run(&plan, workers)
    }

    /// Without drifts, every row is compared with every centre.
    fn plan<'c>(&self, centers: &'c [f32], drift: Vec<f64>) -> Plan<'c> {
        let d = self.points.dim();
        let k = centers.len() / d;
        let bias = biases(self.points, centers);
        let mut norm = 0.0f64;
        let mut h = (f64::INFINITY, f64::NEG_INFINITY);
        for (c, &bias) in centers.chunks_exact(d).zip(&bias) {
            let square = vector::square_norm(c);
            norm = norm.max(square.sqrt() * (1.0 + SLACK));
            // 1e-15: the rounding of the norm and of this difference.
            let (middle, slack) = (0.5 * square - f64::from(bias), 1e-15 * d as f64 * square);
            h = (h.0.min(middle - slack), h.1.max(middle + slack));
        }
        let (mut apart, mut rest) = (None, f64::INFINITY);
        if !drift.is_empty() {
            let chosen = self.far_drifters(&drift);
            rest = (0..k)
                .filter(|&c| !chosen.contains(&(c as u32)))
                .map(|c| drift[c])
                .fold(0.0, f64::max);
            if chosen.len() == k {
                rest = f64::INFINITY;
            } else if !chosen.is_empty() {
                let mut place = vec![u32::MAX; k];
                for (p, &c) in chosen.iter().enumerate() {
                    place[c as usize] = p as u32;
                }
                apart = Some((Screen::new(centers, d, &bias, &chosen), chosen, place));
            }
        }
        let everyone: Vec<u32> = (0..k as u32).collect();
        Plan {
            centers,
            all: Screen::new(centers, d, &bias, &everyone),
            bias,
            apart,
            drift,
            rest,
            norm,
            h,
            exact: OnceLock::new(),
        }
    }

    /// The centres to set apart, ascending, all of them if that saves nothing: judged by a sample of
    /// the rows.
    fn far_drifters(&self, drift: &[f64]) -> Vec<u32> {
        let k = drift.len();
        let mut order: Vec<u32> = (0..k as u32).collect();
        order.sort_by(|&a, &b| {
            drift[b as usize]
                .total_cmp(&drift[a as usize])
                .then(a.cmp(&b))
        });
        // wants[m]: rows whose slack survives once the m farthest are apart, and not sooner.
        let mut wants = vec![0usize; k + 1];
        let step = self.known.len().div_ceil(SAMPLE);
        let mut sampled = 0;
        for known in self.known.iter().step_by(step) {
            let slack = f64::from(known.lower) - f64::from(known.upper);
            wants[order.partition_point(|&c| drift[c as usize] >= slack)] += 1;
            sampled += 1;
        }
        // An eighth must be saved: keeping bounds costs something.
        let (mut best, mut least) = (k, sampled * k * 7 / 8);
        let mut kept = 0;
        for (m, rows) in wants.iter().enumerate().take(k) {
            kept += rows;
            let work = kept * m.next_multiple_of(16) + (sampled - kept) * k;
            if work < least {
                (best, least) = (m, work);
            }
        }
        let mut chosen = order[..best].to_vec();
        chosen.sort_unstable();
        chosen
    }

    fn run(&mut self, plan: &Plan, workers: &Workers) -> Result<()> {
        // The size of a task decides no bit.
        let task = (self.labels.len() / 64)
            .next_multiple_of(BLOCK)
            .clamp(BLOCK, 4096);
        let (points, kept) = (self.points, self.kept);
        workers.each_with(
            self.labels
                .chunks_mut(task)
                .zip(self.known.chunks_mut(task))
                .enumerate(),
            Work::default,
            |work, (t, (labels, known))| {
                Task {
                    points,
                    kept,
                    plan,
                    from: t * task,
                    labels,
                    known,
                }
                .run(work);
            },
        )
    }
}

/// Consecutive rows.
struct Task<'t> {
    points: &'t Points<'t>,
    kept: &'t Kept,
    plan: &'t Plan<'t>,
    from: usize,
    labels: &'t mut [i32],
    known: &'t mut [Known],
}

impl Task<'_> {
    fn run(&mut self, work: &mut Work) {
        work.full.clear();
        work.part.clear();
        work.hard.clear();
        if self.plan.rest.is_infinite() {
            work.full.extend(0..self.labels.len() as u32);
        } else {
            self.sort_out(work);
        }
        self.against_apart(work);
        self.against_all(work);
        self.in_full_precision(work);
    }

    /// Moves the bounds, and finds the rows that they do not settle.
    fn sort_out(&mut self, work: &mut Work) {
        let tightens = !self.plan.all.is_cheap();
        for i in 0..self.labels.len() {
            let own = self.plan.drift[self.labels[i] as usize];
            let before = f64::from(self.known[i].upper);
            self.known[i].upper = up(before + own);
            self.known[i].lower = down(f64::from(self.known[i].lower) - self.plan.rest);
            // If the bound was tight, the distance cannot be below `before - own`.
            if self.is_settled(i)
                || (tightens && f64::from(self.known[i].lower) > before - own && {
                    self.tighten(i, &mut work.row);
                    self.is_settled(i)
                })
            {
                if self.plan.apart.is_some() {
                    work.part.push(i as u32);
                }
            } else {
                work.full.push(i as u32);
            }
        }
    }

    /// The rows of the matrix.
    fn index<'r>(&self, rows: &'r [u32]) -> impl ExactSizeIterator<Item = usize> + Clone + use<'r> {
        let from = self.from;
        rows.iter().map(move |&i| from + i as usize)
    }

    /// E of the module's documentation, for a centre of norm v.
    fn rounding(&self, i: usize, v: f64) -> f64 {
        let d = self.points.dim();
        let g = Screen::rounding(d) * (1.0 + SLACK);
        g * v * (f64::from(self.known[i].norm) + v) + d as f64 * 1e-37
    }

    fn is_settled(&self, i: usize) -> bool {
        let (lower, upper) = (
            f64::from(self.known[i].lower),
            f64::from(self.known[i].upper),
        );
        let doubt = 2.0 * self.rounding(i, self.plan.norm) + (self.plan.h.1 - self.plan.h.0);
        lower > upper && (lower - upper) * (lower + upper) * (1.0 - SLACK) > 2.0 * doubt
    }

    /// Measures the distance to the row's own centre.
    fn tighten(&mut self, i: usize, row: &mut Vec<f32>) {
        let d = self.points.dim();
        row.resize(d, 0.0);
        self.points.read(self.from + i, 0, row);
        let center = &self.plan.centers[self.labels[i] as usize * d..][..d];
        let square = vector::square_distance(row, center);
        self.known[i].upper = up(square.sqrt() * (1.0 + SLACK));
    }

    /// Compares the settled rows with the centres set apart; those in doubt join the others.
    fn against_apart(&mut self, work: &mut Work) {
        let Some((screen, _, place)) = &self.plan.apart else {
            return;
        };
        let part = std::mem::take(&mut work.part);
        for rows in part.chunks(screen.block()) {
            let index = self.index(rows);
            let screened = screen.screen(self.points, self.kept, index, &mut work.screen);
            for (r, &i) in rows.iter().enumerate() {
                let i = i as usize;
                let label = self.labels[i] as usize;
                let products = screened.row(r);
                let (first, second) = vector::two_smallest(screened.bias, products);
                let mut nearest = first;
                if place[label] != u32::MAX {
                    let own = place[label] as usize;
                    if screened.bias[own] - products[own] == first {
                        nearest = second;
                    }
                }
                let nearest = f64::from(nearest);
                let square = screened.rows[r].square;
                let is_farther = |task: &Self| {
                    // An upper bound of the computed score of the row's own centre.
                    let upper = f64::from(task.known[i].upper);
                    let own = 0.5 * (upper * upper * (1.0 + SLACK) - square) - task.plan.h.0;
                    nearest > own + task.rounding(i, task.plan.norm)
                };
                if is_farther(self) || {
                    self.tighten(i, &mut work.row);
                    is_farther(self)
                } {
                    let distance = distance_above(square, nearest, self.plan.h.0);
                    self.known[i].lower = self.known[i].lower.min(distance);
                } else {
                    work.full.push(i as u32);
                }
            }
        }
        work.part = part;
    }

    fn against_all(&mut self, work: &mut Work) {
        let screen = &self.plan.all;
        let full = std::mem::take(&mut work.full);
        for rows in full.chunks(screen.block()) {
            let index = self.index(rows);
            let screened = screen.screen(self.points, self.kept, index, &mut work.screen);
            work.pairs.clear();
            for (r, &i) in rows.iter().enumerate() {
                let products = screened.row(r);
                let (first, second) = vector::two_smallest(screened.bias, products);
                let row = screened.rows[r];
                self.known[i as usize].norm = up(row.norm);
                // Scores are finite: the points are scaled so.
                let Some(best) = vector::find(screened.bias, products, first) else {
                    work.hard.push(i);
                    continue;
                };
                let highest = f64::from(first) + screened.width(best);
                let decided = f64::from(second) > highest;
                // Undecided, any of them may be the nearest or one of the others.
                let others = f64::from(if decided { second } else { first });
                let upper = row.norm * row.norm * (1.0 + SLACK) + 2.0 * (highest + self.plan.h.1);
                self.labels[i as usize] = best as i32;
                self.known[i as usize].upper = up(upper.max(0.0).sqrt() * (1.0 + SLACK));
                self.known[i as usize].lower = distance_above(row.square, others, self.plan.h.0);
                if decided {
                    continue;
                }
                let open = work.pairs.len();
                for (c, (bias, product)) in screened.bias.iter().zip(products).enumerate() {
                    if f64::from(bias - product) <= highest {
                        work.pairs.push((self.from + i as usize, c));
                    }
                }
                if work.pairs.len() - open > MANY {
                    work.pairs.truncate(open);
                    work.hard.push(i);
                }
            }
            self.close_calls(work);
        }
        work.full = full;
    }

    /// Computes the scores of single pairs as defined, and corrects the labels.
    fn close_calls(&mut self, work: &mut Work) {
        let mut best: Option<(usize, f32, usize)> = None;
        for pairs in work.pairs.chunks(CHAINS) {
            let products = chains(self.points, self.plan.centers, pairs, &mut work.exact);
            for (&(row, c), product) in pairs.iter().zip(products) {
                let score = self.plan.bias[c] - product;
                best = match best {
                    Some((r, s, _)) if r == row && score >= s => best,
                    Some((r, _, _)) if r == row => Some((row, score, c)),
                    other => {
                        self.settle(other, &mut work.row);
                        Some((row, score, c))
                    }
                };
            }
        }
        self.settle(best, &mut work.row);
    }

    fn settle(&mut self, winner: Option<(usize, f32, usize)>, row: &mut Vec<f32>) {
        let Some((i, _, c)) = winner else { return };
        let i = i - self.from;
        if self.labels[i] != c as i32 {
            self.labels[i] = c as i32;
            self.tighten(i, row);
        }
    }

    /// Rows with many close calls: every score as defined.
    fn in_full_precision(&mut self, work: &mut Work) {
        if work.hard.is_empty() {
            return;
        }
        let d = self.points.dim();
        let centers = (self.plan.centers, d);
        let packed = self
            .plan
            .exact
            .get_or_init(|| Packed::new(&centers, 0..self.plan.bias.len()));
        let hard = std::mem::take(&mut work.hard);
        for rows in hard.chunks(self.plan.all.block()) {
            let index = self.index(rows);
            let products = tile(Form::Dot, self.points, index, packed, &mut work.exact);
            for (&i, products) in rows.iter().zip(products.chunks_exact(packed.padded())) {
                let i = i as usize;
                self.labels[i] = vector::arg_min(&self.plan.bias, products) as i32;
                self.tighten(i, &mut work.row);
                self.known[i].lower = 0.0;
            }
        }
        work.hard = hard;
    }
}

/// A distance no larger than that of any centre whose score is at least `score`.
fn distance_above(square: f64, score: f64, h: f64) -> f32 {
    let square = square + 2.0 * (score + h);
    down(square.max(0.0).sqrt() * (1.0 - SLACK))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::noise;
    use crate::matrix::Matrix;

    /// The labels as they are defined.
    fn defined(points: &Points, centers: &[f32]) -> Vec<i32> {
        let d = points.dim();
        let packed = Packed::new(&(centers, d), 0..centers.len() / d);
        let bias = biases(points, centers);
        let mut scratch = Scratch::default();
        let n = points.rows();
        (0..n)
            .step_by(BLOCK)
            .flat_map(|from| {
                let rows = from..(from + BLOCK).min(n);
                let products = tile(Form::Dot, points, rows, &packed, &mut scratch);
                products
                    .chunks_exact(packed.padded())
                    .map(|row| vector::arg_min(&bias, row) as i32)
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        vector::square_distance(a, b).sqrt() * (1.0 + SLACK)
    }

    #[test]
    fn bounds_and_screens_change_no_label() {
        let workers = Workers::new(Some(2)).unwrap();
        for (n, d, k, unit) in [
            (700, 20, 30, false),
            (500, 600, 40, false),
            (400, 33, 9, true),
        ] {
            let mut x = noise(n * d, 5);
            // Duplicates, and a few rows far out.
            x.copy_within(0..40 * d, 50 * d);
            x[..3 * d].iter_mut().for_each(|v| *v *= 50.0);
            let x = Matrix::new(&x, n, d).unwrap();
            let points = if unit {
                Points::unit(x, &workers).unwrap()
            } else {
                Points::centred(x, &workers).unwrap()
            };
            let rows: Vec<usize> = (0..k).map(|c| c * 7 % n).collect();
            let mut centers = points.gather(&rows);
            // Two equal centres: the first must win every tie.
            centers.copy_within(0..d, 2 * d);
            let kept = Kept::new(&points, &workers).unwrap();
            let mut assignment = Assignment::new(&points, &kept);
            assignment.assign(&centers, &workers).unwrap();
            assert_eq!(assignment.labels, defined(&points, &centers));
            for round in 0..40u64 {
                let before = centers.clone();
                // Most rest, some creep, now and then one leaps.
                for (c, center) in centers.chunks_exact_mut(d).enumerate() {
                    let size = match (c as u64 + round) % 6 {
                        0 if round % 4 == 1 => 0.5,
                        1 | 2 => 0.003,
                        3 => 1e-6,
                        _ => 0.0,
                    };
                    let push = noise(d, round * 1000 + c as u64);
                    center
                        .iter_mut()
                        .zip(push)
                        .for_each(|(v, p)| *v += size * p);
                }
                let drift = centers
                    .chunks_exact(d)
                    .zip(before.chunks_exact(d))
                    .map(|(a, b)| distance(a, b))
                    .collect();
                assignment.reassign(&centers, drift, &workers).unwrap();
                assert_eq!(
                    assignment.labels,
                    defined(&points, &centers),
                    "{n} {d} {round}"
                );
                for (i, known) in assignment.known.iter().enumerate() {
                    let mut row = vec![0.0; d];
                    points.read(i, 0, &mut row);
                    for (c, center) in centers.chunks_exact(d).enumerate() {
                        let true_distance = vector::square_distance(&row, center).sqrt();
                        if c as i32 == assignment.labels[i] {
                            assert!(true_distance <= f64::from(known.upper) * (1.0 + 1e-6));
                        } else {
                            assert!(true_distance >= f64::from(known.lower) * (1.0 - 1e-6));
                        }
                    }
                }
            }
        }
    }
}
