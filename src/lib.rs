//! The numeric core of nest-rs: find the feed-forward neurons of a language model that carry
//! refusal, group them, and move exactly those rows of its weights.
//!
//! The method is NeST ("Neuron Selective Tuning for LLM Safety", arXiv 2602.16835). This crate holds
//! its arithmetic and its files; it knows nothing of Python unless built with the feature `python`.
//!
//! | step | here |
//! |---|---|
//! | activations to disk, and statistics in passing | [`ActivationStore`], [`activations`] |
//! | one linear probe a matrix | [`Probe`] |
//! | rows whose weight stands out | [`select_rows`] |
//! | clusters of rows, and how many | [`KMeans`], [`silhouette()`] |
//! | deltas into the rows of a checkpoint | [`fold`] |
//!
//! Inputs are row-major slices of f32, f16 or bf16 with a shape ([`Matrix`]); errors are typed
//! ([`Error`]) and name the offending value; nothing panics on what a user passes in.
//!
//! ```
//! use nest_rs::{KMeans, Matrix, silhouette, silhouette::Distance};
//!
//! // Six points in the plane, in two groups.
//! let x = [0.0f32, 0.0, 0.1, 0.2, 0.2, 0.1, 5.0, 5.0, 5.1, 5.2, 5.2, 5.1];
//! let x = Matrix::new(&x[..], 6, 2)?;
//! let fit = KMeans::new(2).n_init(5).seed(1).fit(&x)?;
//! assert_eq!(fit.labels[..3], [fit.labels[0]; 3]);
//! assert!(silhouette(&x, &fit.labels, Distance::Euclidean)?.mean > 0.9);
//! # Ok::<(), nest_rs::Error>(())
//! ```
//!
//! # Determinism
//! The same input and seed give the same bits at any number of threads: tiles and chunks have sizes
//! fixed by the shape, results are combined in index order, and random numbers come from ChaCha
//! streams named by (seed, restart). The bits are the same on AVX-512, AVX2, NEON and in portable
//! Rust too, because all share one order of fused multiply-adds. The environment variable
//! `NEST_RS_ISA` pins one of them; [`active_isa`] tells which runs. Where AVX-512 has products of bfloat16
//! they screen, with a proven bound on their error, what f32 then decides: not one bit changes. Euclidean
//! silhouettes of more than 5,120 rows alone differ on processors with AMX, by less than 1e-6: their products there are
//! sums of whole numbers.
//!
//! # Threads
//! One pool a process, made when first needed, safe to fork. `n_threads: None` takes all; [`Workers`]
//! also carries a flag that stops a long computation.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod activations;
mod error;
pub mod fold;
pub mod gguf;
mod header;
mod kernel;
pub mod kmeans;
mod logistic;
mod matrix;
mod pairs;
mod points;
mod pool;
#[cfg(feature = "python")]
mod python;
mod select;
pub mod silhouette;

pub use activations::ActivationStore;
pub use error::{Error, Result};
pub use kernel::{Isa, active_isa};
pub use kmeans::KMeans;
pub use logistic::{Probe, ProbeFit};
pub use matrix::{Dtype, Matrix, Values};
pub use pool::Workers;
pub use select::select_rows;
pub use silhouette::silhouette;

/// The README's Rust example runs as a doctest.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
