//! Work for several threads: an output cut into parts that nobody shares.
use nibblas_core::isa::{self, Isa};
use nibblas_core::{pool, Result};
use std::sync::{Mutex, PoisonError};

/// How a call runs. Results depend on none of it.
#[derive(Clone, Copy)]
pub struct Exec<'a> {
    /// Instruction-set level.
    pub isa: Isa,
    /// At most this many threads.
    pub threads: usize,
    /// Asked now and then whether to stop.
    pub poll: Option<&'a (dyn Fn() -> bool + Sync)>,
}

impl Default for Exec<'_> {
    fn default() -> Self {
        Self { isa: isa::active(), threads: 1, poll: None }
    }
}

impl Exec<'_> {
    /// Elements of one part of `len`, in whole multiples of `unit`: enough to be worth a thread.
    pub fn part(&self, len: usize, unit: usize) -> usize {
        const LEAST: usize = 1 << 14;
        const MOST: usize = 1 << 20;
        let wanted = len.div_ceil(self.threads.max(1) * 4).clamp(LEAST, MOST);
        wanted.div_ceil(unit.max(1)) * unit.max(1)
    }

    /// Calls `f(i, part)` for every part, on several threads.
    ///
    /// # Errors
    /// The first error of a call, or [`nibblas_core::Error::Interrupted`].
    pub fn each<P: Send>(&self, parts: Vec<P>, f: impl Fn(usize, P) -> Result<()> + Sync) -> Result<()> {
        let cells: Vec<_> = parts.into_iter().map(|p| Mutex::new(Some(p))).collect();
        pool::try_run(self.threads, cells.len(), self.poll, |i| {
            let part = cells[i].lock().unwrap_or_else(PoisonError::into_inner).take();
            part.map_or(Ok(()), |p| f(i, p))
        })
    }
}
