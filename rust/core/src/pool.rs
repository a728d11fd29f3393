//! A thread pool that survives `fork`.
//!
//! A forked child inherits the memory of a pool but none of its threads, so the handle is keyed by process id: the child
//! leaks the inherited one and builds its own. Nothing here holds a lock, so a fork can happen at any moment.
use crate::error::{Error, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// More threads than this are never started; results do not depend on the number.
pub const MAX_THREADS: usize = 256;

/// How often a long call asks its caller whether to stop.
const POLL_EVERY: Duration = Duration::from_millis(40);

struct Handle {
    pid: u32,
    threads: usize,
    pool: ThreadPool,
    /// The pool that this one replaced, which other threads may be using: kept for ever, and not lost.
    _older: *mut Handle,
}

static CURRENT: AtomicPtr<Handle> = AtomicPtr::new(null_mut());

/// A pool of at least `threads` workers, or `None` when the system refuses to start them.
fn pool(threads: usize) -> Option<&'static ThreadPool> {
    let pid = std::process::id();
    let old = CURRENT.load(Ordering::Acquire);
    // SAFETY: handles are leaked when published, so the pointer is null or valid for ever.
    if let Some(h) = unsafe { old.as_ref() } {
        if h.pid == pid && h.threads >= threads {
            return Some(&h.pool);
        }
    }
    let size = threads.next_power_of_two();
    let pool = ThreadPoolBuilder::new().num_threads(size).thread_name(|i| format!("nibblas-{i}")).build().ok()?;
    let new = Box::into_raw(Box::new(Handle { pid, threads: size, pool, _older: old }));
    if CURRENT.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        // SAFETY: just leaked above.
        return Some(unsafe { &(*new).pool });
    }
    // Another thread published first; ours is still private and may be freed.
    // SAFETY: `new` came from Box::into_raw above and was never shared.
    drop(unsafe { Box::from_raw(new) });
    pool_published(threads)
}

fn pool_published(threads: usize) -> Option<&'static ThreadPool> {
    // SAFETY: as in `pool`.
    unsafe { CURRENT.load(Ordering::Acquire).as_ref() }
        .filter(|h| h.pid == std::process::id() && h.threads >= threads)
        .map(|h| &h.pool)
}

thread_local! {
    /// When this thread last asked. Kept from run to run: a long call may be many short runs.
    static ASKED: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Whether it is time to ask again.
fn is_due() -> bool {
    let now = Instant::now();
    let due = ASKED.get().is_none_or(|last| now.duration_since(last) >= POLL_EVERY);
    if due {
        ASKED.set(Some(now));
    }
    due
}

/// Runs `f(i)` for every `i < tasks` on up to `threads` threads, the caller's among them, in no fixed order.
///
/// `poll` is called from the caller's thread every 40 ms or so; when it answers true no further task starts and the
/// function returns false. Runs on the caller alone when it is itself a worker of the pool, or no thread can be started.
pub fn run(threads: usize, tasks: usize, poll: Option<&(dyn Fn() -> bool + Sync)>, f: impl Fn(usize) + Sync) -> bool {
    let helpers = threads.min(tasks).min(MAX_THREADS).saturating_sub(1);
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let work = || {
        while !stop.load(Ordering::Relaxed) {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                break;
            }
            f(i);
        }
    };
    let lead = || {
        let Some(poll) = poll else { return work() };
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                break;
            }
            f(i);
            if is_due() && poll() {
                stop.store(true, Ordering::Relaxed);
                break;
            }
        }
    };
    let pool = if helpers == 0 || rayon::current_thread_index().is_some() { None } else { pool(helpers) };
    match pool {
        None => lead(),
        Some(p) => p.in_place_scope(|s| {
            for _ in 0..helpers {
                s.spawn(|_| work());
            }
            lead();
        }),
    }
    !stop.load(Ordering::Relaxed)
}

/// As [`run`], for tasks that may fail: after a failure no further task starts, and its error is the result.
///
/// # Errors
/// The first error of a task, or [`Error::Interrupted`] where `poll` asked to stop.
pub fn try_run(
    threads: usize,
    tasks: usize,
    poll: Option<&(dyn Fn() -> bool + Sync)>,
    f: impl Fn(usize) -> Result<()> + Sync,
) -> Result<()> {
    let failed = OnceLock::new();
    let finished = run(threads, tasks, poll, |i| {
        if failed.get().is_none() {
            if let Err(e) = f(i) {
                // Another task may have failed first; either error tells the caller why.
                let _ = failed.set(e);
            }
        }
    });
    match failed.into_inner() {
        Some(e) => Err(e),
        None if finished => Ok(()),
        None => Err(Error::Interrupted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 7, 64] {
            let hits: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            assert!(run(threads, hits.len(), None, |i| {
                hits[i].fetch_add(1, Ordering::Relaxed);
            }));
            assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn nested_calls_finish() {
        let n = AtomicUsize::new(0);
        run(4, 8, None, |_| {
            run(4, 8, None, |_| {
                n.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(n.load(Ordering::Relaxed), 64);
    }

    #[test]
    fn a_failing_task_ends_the_run() {
        for threads in [1, 4] {
            let failed = try_run(threads, 100, None, |i| if i == 7 { Err(Error::OutOfMemory(i)) } else { Ok(()) });
            assert!(matches!(failed, Err(Error::OutOfMemory(7))));
        }
        assert!(matches!(try_run(2, 9, Some(&|| false), |_| Ok(())), Ok(())));
    }

    #[test]
    fn poll_stops_the_run() {
        let done = AtomicUsize::new(0);
        let finished = run(2, 10_000, Some(&|| true), |_| {
            std::thread::sleep(Duration::from_millis(5));
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert!(!finished && done.load(Ordering::Relaxed) < 1000);
    }
}
