//! Activations on disk and in passing: the store, and statistics that never hold a batch twice.

mod stats;
mod store;

pub use stats::{ClassStats, Pooled, masked_max};
pub use store::{ActivationStore, Site, StoreWriter};
