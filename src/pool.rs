//! Threads: one lazy pool a process, and the only way work reaches it.
//!
//! Nothing is built at import. The pool belongs to the process that made it: a forked child, whose
//! inherited pool has no threads behind it, forgets that pool and makes its own. With one thread no
//! pool is made at all.
//!
//! No function here decides the order of a floating-point sum. Work items are handed out in index
//! order to whichever worker is free, each writes its own slot, and callers combine the slots in
//! index order: so the number of threads cannot change a bit.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, TryLockError};

use crate::error::{Error, Result};
use crate::kernel;

struct Shared {
    pid: u32,
    size: usize,
    pool: rayon::ThreadPool,
}

static SHARED: Mutex<Option<Arc<Shared>>> = Mutex::new(None);

/// The pool's slot. A fork may have copied the lock while another thread of the parent held it, for
/// the few instructions it is ever held; so never wait for it for long.
fn with_slot<R>(use_slot: impl FnOnce(&mut Option<Arc<Shared>>) -> R) -> Option<R> {
    for _ in 0..10_000 {
        match SHARED.try_lock() {
            Ok(mut slot) => return Some(use_slot(&mut slot)),
            Err(TryLockError::Poisoned(held)) => return Some(use_slot(&mut held.into_inner())),
            Err(TryLockError::WouldBlock) => std::thread::yield_now(),
        }
    }
    None
}

fn shared(size: usize) -> Result<Arc<Shared>> {
    let pid = std::process::id();
    let found = with_slot(|slot| match slot {
        Some(shared) if shared.pid == pid && shared.size >= size => Some(Arc::clone(shared)),
        Some(shared) if shared.pid != pid => {
            // The threads of this pool live in the parent; even dropping it would wait for them.
            std::mem::forget(slot.take());
            None
        }
        _ => None,
    });
    if let Some(Some(shared)) = found {
        return Ok(shared);
    }
    // Powers of two, so that growing requests make few pools. An outgrown pool ends when its last
    // user does.
    let size = size.next_power_of_two();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(size)
        .thread_name(|i| format!("nest-rs-{i}"))
        .build()
        .map_err(|e| Error::argument("n_threads", size, e.to_string()))?;
    let shared = Arc::new(Shared { pid, size, pool });
    let outgrown = with_slot(|slot| slot.replace(Arc::clone(&shared)));
    drop(outgrown);
    Ok(shared)
}

/// How many threads a computation may use, and how to stop it.
///
/// ```
/// use nest_rs::Workers;
/// let two = Workers::new(Some(2))?;
/// assert_eq!(two.n_threads(), 2);
/// # Ok::<(), nest_rs::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Workers<'c> {
    n: usize,
    cancel: Option<&'c AtomicBool>,
}

impl Workers<'static> {
    /// `n_threads` threads; `None` for as many as the process may run at once.
    ///
    /// # Errors
    /// `n_threads` is 0 or above 1024, or `NEST_RS_ISA` names no instruction set of this processor.
    pub fn new(n_threads: Option<usize>) -> Result<Self> {
        kernel::check_isa()?;
        let n = match n_threads {
            None => std::thread::available_parallelism().map_or(1, |n| n.get()),
            Some(n @ 1..=1024) => n,
            Some(n) => {
                return Err(Error::argument(
                    "n_threads",
                    n,
                    "must be between 1 and 1024",
                ));
            }
        };
        Ok(Workers { n, cancel: None })
    }
}

impl<'c> Workers<'c> {
    /// The same workers, which stop with [`Error::Interrupted`] soon after `flag` becomes true.
    pub fn with_cancel(self, flag: &AtomicBool) -> Workers<'_> {
        Workers {
            n: self.n,
            cancel: Some(flag),
        }
    }

    /// The number of threads asked for.
    pub fn n_threads(&self) -> usize {
        self.n
    }

    /// One thread, the same cancellation: for work inside a parallel loop.
    pub(crate) fn serial(&self) -> Workers<'c> {
        Workers {
            n: 1,
            cancel: self.cancel,
        }
    }

    fn cancelled(&self) -> bool {
        self.cancel.is_some_and(|flag| flag.load(Ordering::Relaxed))
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.cancelled() {
            return Err(Error::Interrupted);
        }
        Ok(())
    }

    /// Runs `work` on every item. Each worker makes one scratch value with `scratch` and reuses it.
    pub(crate) fn each_with<T: Send, S>(
        &self,
        items: impl ExactSizeIterator<Item = T> + Send,
        scratch: impl Fn() -> S + Sync,
        work: impl Fn(&mut S, T) + Sync,
    ) -> Result<()> {
        let n_workers = self.n.min(items.len());
        let queue = Mutex::new(items);
        let take = || match queue.lock() {
            Ok(mut items) => items.next(),
            Err(_) => None, // a worker panicked inside the iterator: its panic is on the way
        };
        let worker = || {
            let mut own = scratch();
            while !self.cancelled() {
                let Some(item) = take() else { break };
                work(&mut own, item);
            }
        };
        if n_workers == 1 {
            worker();
        } else if n_workers > 1 {
            shared(self.n)?.pool.scope(|scope| {
                for _ in 0..n_workers {
                    scope.spawn(|_| worker());
                }
            });
        }
        self.check()
    }

    /// [`Workers::each_with`] without scratch.
    pub(crate) fn each<T: Send>(
        &self,
        items: impl ExactSizeIterator<Item = T> + Send,
        work: impl Fn(T) + Sync,
    ) -> Result<()> {
        self.each_with(items, || (), |(), item| work(item))
    }

    /// `work(scratch, 0), work(scratch, 1), ...`, in index order.
    pub(crate) fn map_with<R: Send, S>(
        &self,
        n: usize,
        scratch: impl Fn() -> S + Sync,
        work: impl Fn(&mut S, usize) -> R + Sync,
    ) -> Result<Vec<R>> {
        let mut slots: Vec<Option<R>> = Vec::new();
        slots.resize_with(n, || None);
        self.each_with(slots.iter_mut().enumerate(), scratch, |own, (i, slot)| {
            *slot = Some(work(own, i));
        })?;
        // Every slot is full, or `each_with` has returned `Interrupted`.
        Ok(slots.into_iter().flatten().collect())
    }

    /// `work(item)` of each item, in index order.
    pub(crate) fn map_mut<T: Send, R: Send>(
        &self,
        items: &mut [T],
        work: impl Fn(&mut T) -> R + Sync,
    ) -> Result<Vec<R>> {
        let mut slots: Vec<Option<R>> = Vec::new();
        slots.resize_with(items.len(), || None);
        self.each(items.iter_mut().zip(&mut slots), |(item, slot)| {
            *slot = Some(work(item));
        })?;
        Ok(slots.into_iter().flatten().collect())
    }

    /// [`Workers::map_with`] without scratch.
    pub(crate) fn map<R: Send>(
        &self,
        n: usize,
        work: impl Fn(usize) -> R + Sync,
    ) -> Result<Vec<R>> {
        self.map_with(n, || (), |(), i| work(i))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_index_order() {
        for n in [1, 2, 8] {
            let workers = Workers::new(Some(n)).unwrap();
            let squares = workers.map(1000, |i| i * i).unwrap();
            assert!(squares.iter().enumerate().all(|(i, &s)| s == i * i));
        }
    }

    #[test]
    fn nested_loops_finish() {
        let workers = Workers::new(Some(4)).unwrap();
        let sums = workers
            .map(16, |i| {
                workers
                    .map(16, |j| i * j)
                    .unwrap()
                    .into_iter()
                    .sum::<usize>()
            })
            .unwrap();
        assert_eq!(sums[3], 3 * 120);
    }

    #[test]
    fn a_raised_flag_stops_the_loop() {
        let flag = AtomicBool::new(false);
        let workers = Workers::new(Some(2)).unwrap().with_cancel(&flag);
        let done = workers.each(0..1_000_000usize, |i| {
            if i == 100 {
                flag.store(true, Ordering::Relaxed);
            }
        });
        assert!(matches!(done, Err(Error::Interrupted)));
    }

    #[test]
    fn thread_counts_are_checked() {
        assert!(Workers::new(Some(0)).is_err());
        assert!(Workers::new(Some(5000)).is_err());
    }
}
