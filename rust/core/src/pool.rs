//! Threads that wait for work, and survive `fork`.
//!
//! A product may take a tenth of a millisecond, and waking a sleeping thread as long as half of that. So helpers look out
//! for the next call for a moment before they sleep, and a caller that finishes first takes back what a helper has not
//! begun. Each helper has a slot of its own: callers on several threads at once share the idle ones and wait for none.
//!
//! Every thread begins with a share of the tasks that is the same in every call of so many threads, and then takes what the
//! others have left: what a task reads is likely to lie in the caches of the core that did it before.
//!
//! A forked child inherits the memory of the helpers but none of the threads, so the team is keyed by process id: the child
//! leaks the inherited one and builds its own. Nothing here holds a lock while a call begins, so a fork can happen at any
//! moment.
use crate::error::{Error, Result};
use std::any::Any;
use std::cell::Cell;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::ptr::{null_mut, without_provenance_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// More threads than this are never started; results do not depend on the number.
pub const MAX_THREADS: usize = 256;

/// How often a long call asks its caller whether to stop.
const POLL_EVERY: Duration = Duration::from_millis(40);

/// How long an idle helper looks out for the next call before it sleeps.
const LOOK_OUT: Duration = Duration::from_micros(100);

/// What a caller asks of its helpers. It lies on the caller's stack, and the caller waits until `pending` is 0.
struct Job<'a> {
    /// Told which helper it is, from 1.
    work: &'a (dyn Fn(usize) + Sync),
    /// Helpers that have it.
    pending: AtomicUsize,
    caller: Thread,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

type JobPtr = *mut Job<'static>;

/// A helper: what it is to do, null while it looks out, or one of the two marks.
struct Slot {
    job: AtomicPtr<Job<'static>>,
    thread: OnceLock<Thread>,
}

/// The helper sleeps.
fn asleep() -> JobPtr {
    without_provenance_mut(1)
}

/// The helper works.
fn busy() -> JobPtr {
    without_provenance_mut(2)
}

impl Slot {
    /// Waits for a job; `patient`: looks out before sleeping.
    fn next(&self, patient: bool) -> JobPtr {
        let offered = |p: JobPtr| !p.is_null() && p != asleep();
        let begin = Instant::now();
        loop {
            for _ in 0..if patient { 64 } else { 1 } {
                let p = self.job.load(Ordering::Acquire);
                if offered(p) {
                    return p;
                }
                std::hint::spin_loop();
            }
            if !patient || begin.elapsed() >= LOOK_OUT {
                break;
            }
        }
        if let Err(p) = self.job.compare_exchange(null_mut(), asleep(), Ordering::AcqRel, Ordering::Acquire) {
            return p;
        }
        loop {
            thread::park();
            let p = self.job.load(Ordering::Acquire);
            if p != asleep() {
                return p;
            }
        }
    }

    /// The life of helper `i`.
    fn serve(&self, i: usize, patient: bool) -> ! {
        HELPER.set(true);
        loop {
            let p = self.next(patient);
            // The caller may have taken it back.
            if p.is_null() || self.job.compare_exchange(p, busy(), Ordering::AcqRel, Ordering::Acquire).is_err() {
                continue;
            }
            // SAFETY: the job is this helper's since the exchange, so its caller waits for `pending`.
            let job = unsafe { &*p };
            let caller = job.caller.clone();
            if let Err(e) = catch_unwind(AssertUnwindSafe(|| (job.work)(i))) {
                *job.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
            }
            self.job.store(null_mut(), Ordering::Release);
            if job.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
                caller.unpark();
            }
        }
    }
}

thread_local! {
    /// Whether this thread is a helper.
    static HELPER: Cell<bool> = const { Cell::new(false) };
}

struct Team {
    pid: u32,
    slots: [OnceLock<&'static Slot>; MAX_THREADS],
    count: AtomicUsize,
    growing: AtomicBool,
    /// The team of the process that this one was forked from: lost, and kept reachable.
    _older: *mut Team,
}

static CURRENT: AtomicPtr<Team> = AtomicPtr::new(null_mut());

/// This process's team.
fn team() -> &'static Team {
    let pid = std::process::id();
    loop {
        let old = CURRENT.load(Ordering::Acquire);
        // SAFETY: teams are leaked when published, so the pointer is null or valid for ever.
        if let Some(t) = unsafe { old.as_ref() } {
            if t.pid == pid {
                return t;
            }
        }
        let new = Box::into_raw(Box::new(Team {
            pid,
            slots: [const { OnceLock::new() }; MAX_THREADS],
            count: AtomicUsize::new(0),
            growing: AtomicBool::new(false),
            _older: old,
        }));
        if CURRENT.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: `new` came from Box::into_raw above and was never shared.
            drop(unsafe { Box::from_raw(new) });
        }
    }
}

impl Team {
    /// Starts helpers up to `want`, or as many as the system allows. While another thread does so, there are as many as
    /// there are.
    fn grow(&self, want: usize) {
        if self.count.load(Ordering::Acquire) >= want || self.growing.swap(true, Ordering::Acquire) {
            return;
        }
        let cores = thread::available_parallelism().map_or(1, usize::from);
        for i in self.count.load(Ordering::Acquire)..want {
            let slot: &'static Slot =
                Box::leak(Box::new(Slot { job: AtomicPtr::new(null_mut()), thread: OnceLock::new() }));
            // Where threads outnumber cores, looking out takes time from those that work.
            let patient = i + 1 < cores;
            let Ok(handle) =
                thread::Builder::new().name(format!("nibblas-{i}")).spawn(move || slot.serve(i + 1, patient))
            else {
                break;
            };
            let _ = slot.thread.set(handle.thread().clone());
            let _ = self.slots[i].set(slot);
            self.count.store(i + 1, Ordering::Release);
        }
        self.growing.store(false, Ordering::Release);
    }

    fn slots(&self) -> impl Iterator<Item = &'static Slot> + '_ {
        self.slots[..self.count.load(Ordering::Acquire)].iter().filter_map(|s| s.get().copied())
    }

    /// Does `lead` on this thread and `work` on up to `helpers` others, those that are idle, and waits for them.
    fn share(&self, helpers: usize, work: &(dyn Fn(usize) + Sync), lead: impl FnOnce()) {
        self.grow(helpers);
        let job = Job { work, pending: AtomicUsize::new(0), caller: thread::current(), panic: Mutex::new(None) };
        let p: JobPtr = (&raw const job).cast_mut().cast();
        let mut given = 0;
        for slot in self.slots() {
            if given == helpers {
                break;
            }
            let idle = slot.job.load(Ordering::Relaxed);
            if !idle.is_null() && idle != asleep() {
                continue;
            }
            job.pending.fetch_add(1, Ordering::Relaxed);
            if slot.job.compare_exchange(idle, p, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                job.pending.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            given += 1;
            if let (true, Some(t)) = (idle == asleep(), slot.thread.get()) {
                t.unpark();
            }
        }
        // Waits even where `lead` panics: the job must outlive its helpers.
        let waits = Waits(self, &job, p);
        lead();
        drop(waits);
        let panic = job.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(e) = panic {
            resume_unwind(e);
        }
    }
}

struct Waits<'a>(&'a Team, &'a Job<'a>, JobPtr);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let Self(team, job, p) = *self;
        for slot in team.slots() {
            if slot.job.compare_exchange(p, null_mut(), Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                job.pending.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let mut looks = 0;
        while job.pending.load(Ordering::Acquire) != 0 {
            looks += 1;
            if looks < 10_000 {
                std::hint::spin_loop();
            } else {
                thread::park_timeout(Duration::from_millis(1));
            }
        }
    }
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

/// The tasks of one thread that nobody has begun: the first and the end of them in one word.
#[repr(align(64))]
struct Share(AtomicU64);

impl Share {
    fn new(first: u32, end: u32) -> Self {
        Self(AtomicU64::new(u64::from(first) << 32 | u64::from(end)))
    }

    /// Takes the first task, or the last.
    fn take(&self, first: bool) -> Option<usize> {
        let mut now = self.0.load(Ordering::Relaxed);
        loop {
            let (begin, end) = ((now >> 32) as usize, now as u32 as usize);
            if begin >= end {
                return None;
            }
            let (task, left) = if first { (begin, now + (1 << 32)) } else { (end - 1, now - 1) };
            match self.0.compare_exchange_weak(now, left, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(task),
                Err(other) => now = other,
            }
        }
    }
}

/// Shares at most; more threads have one in common with another.
const SHARES: usize = 32;

/// The order in which a thread takes the tasks of its share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// From the first on.
    Forward,
    /// From the last on, but so many at a time, at least one, forward.
    Backward(usize),
}

impl Order {
    /// Which of the tasks from `begin` to `end` is the one that [`Share::take`] took.
    fn task(self, at: usize, begin: usize, end: usize) -> usize {
        match self {
            Order::Forward => at,
            Order::Backward(stretch) => {
                let turn = end - 1 - at;
                let (whole, rest) = (turn / stretch * stretch, turn % stretch);
                (end - whole).saturating_sub(stretch).max(begin) + rest
            }
        }
    }
}

/// Runs `f(i)` for every `i < tasks` on up to `threads` threads, the caller's among them. Each takes its share in `order` and
/// then what is left of others' from the other end.
///
/// `poll` is called from the caller's thread every 40 ms or so; when it answers true no further task starts and the
/// function returns false. Runs on the caller alone when it is itself a helper, or no other thread is to be had.
pub fn run(
    threads: usize,
    tasks: usize,
    order: Order,
    poll: Option<&(dyn Fn() -> bool + Sync)>,
    f: impl Fn(usize) + Sync,
) -> bool {
    const MOST: usize = u32::MAX as usize;
    (0..tasks).step_by(MOST).all(|base| run_some(threads, MOST.min(tasks - base), order, poll, &|i| f(base + i)))
}

/// [`run`] of at most `u32::MAX` tasks.
fn run_some(
    threads: usize,
    tasks: usize,
    order: Order,
    poll: Option<&(dyn Fn() -> bool + Sync)>,
    f: &(dyn Fn(usize) + Sync),
) -> bool {
    let helpers = threads.min(tasks).min(MAX_THREADS).saturating_sub(1);
    let alone = helpers == 0 || HELPER.get();
    let count = if alone { 1 } else { (helpers + 1).min(SHARES) };
    let first = |i: usize| (tasks as u64 * i.min(count) as u64 / count as u64) as u32;
    let shares: [Share; SHARES] = std::array::from_fn(|i| Share::new(first(i), first(i + 1)));
    let stop = AtomicBool::new(false);
    // Does `f` for the tasks of thread `i`, then for those that others have left.
    let walk = |i: usize, poll: Option<&(dyn Fn() -> bool + Sync)>| {
        for j in 0..count {
            let (own, k) = (j == 0, (i + j) % count);
            while !stop.load(Ordering::Relaxed) {
                let Some(at) = shares[k].take(own == (order == Order::Forward)) else { break };
                f(order.task(at, first(k) as usize, first(k + 1) as usize));
                if poll.is_some_and(|poll| is_due() && poll()) {
                    stop.store(true, Ordering::Relaxed);
                }
            }
        }
    };
    if alone {
        walk(0, poll);
    } else {
        team().share(helpers, &|i| walk(i, None), || walk(0, poll));
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
    try_run_in(threads, tasks, Order::Forward, poll, f)
}

/// As [`try_run`], in an order.
///
/// # Errors
/// As there.
pub fn try_run_in(
    threads: usize,
    tasks: usize,
    order: Order,
    poll: Option<&(dyn Fn() -> bool + Sync)>,
    f: impl Fn(usize) -> Result<()> + Sync,
) -> Result<()> {
    let failed = OnceLock::new();
    let finished = run(threads, tasks, order, poll, |i| {
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
        let orders = [Order::Forward, Order::Backward(1), Order::Backward(3), Order::Backward(usize::MAX)];
        for (threads, order) in [1, 2, 3, 7, 40, 64].into_iter().flat_map(|t| orders.map(|o| (t, o))) {
            let hits: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            assert!(run(threads, hits.len(), order, None, |i| {
                hits[i].fetch_add(1, Ordering::Relaxed);
            }));
            assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn one_thread_goes_in_order() {
        let seen = Mutex::new(Vec::new());
        run(1, 5, Order::Forward, None, |i| seen.lock().unwrap().push(i));
        run(1, 5, Order::Backward(1), None, |i| seen.lock().unwrap().push(i));
        run(1, 5, Order::Backward(2), None, |i| seen.lock().unwrap().push(i));
        assert_eq!(seen.into_inner().unwrap(), [0, 1, 2, 3, 4, 4, 3, 2, 1, 0, 3, 4, 1, 2, 0]);
    }

    #[test]
    fn nested_calls_finish() {
        let n = AtomicUsize::new(0);
        run(4, 8, Order::Forward, None, |_| {
            run(4, 8, Order::Forward, None, |_| {
                n.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(n.load(Ordering::Relaxed), 64);
    }

    #[test]
    fn callers_share_the_helpers() {
        std::thread::scope(|s| {
            for t in 0..16 {
                s.spawn(move || {
                    for round in 0..200 {
                        let hits: Vec<AtomicUsize> = (0..=(t + round) % 40).map(|_| AtomicUsize::new(0)).collect();
                        run(1 + t % 5, hits.len(), Order::Backward(2), None, |i| {
                            hits[i].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1));
                    }
                });
            }
        });
    }

    #[test]
    fn helpers_wake_from_sleep() {
        for _ in 0..20 {
            let threads = Mutex::new(std::collections::HashSet::new());
            run(4, 64, Order::Forward, None, |_| {
                std::thread::sleep(Duration::from_micros(200));
                threads.lock().unwrap().insert(std::thread::current().id());
            });
            assert!(threads.into_inner().unwrap().len() > 1);
            std::thread::sleep(3 * LOOK_OUT);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_helpers_live_on() {
        for bad in [0, 63] {
            let caught = catch_unwind(|| {
                run(4, 64, Order::Forward, None, |i| {
                    std::thread::sleep(Duration::from_micros(50));
                    assert!(i != bad, "task {bad}");
                });
            });
            assert!(caught.is_err());
        }
        let n = AtomicUsize::new(0);
        run(4, 1000, Order::Forward, None, |_| {
            n.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(n.into_inner(), 1000);
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
        let finished = run(2, 10_000, Order::Forward, Some(&|| true), |_| {
            std::thread::sleep(Duration::from_millis(5));
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert!(!finished && done.load(Ordering::Relaxed) < 1000);
    }
}
