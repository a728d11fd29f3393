//! A product that has been done before allocates nothing.
use nibblas_core::gemm::{matmul, Compute, Options};
use nibblas_core::pack::pack;
use nibblas_core::quantize::{quantize, Method};
use nibblas_core::{Format, MatMut, MatRef};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: the system's allocator, counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = COUNT.try_with(|c| c.set(c.get() + 1));
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_repeated_product_allocates_nothing() {
    let (n, k) = (80, 256);
    let values: Vec<f32> = (0..n * k).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.01).collect();
    for name in ["int4_g32", "int4_g128", "uint4_g64", "int3_g128", "int8", "bipolar1", "ternary_g128"] {
        let format = Format::parse(name).unwrap();
        let q = quantize(&MatRef::from_f32(&values, n, k), &format, Method::Rtn, 1).unwrap();
        let w = pack(&q.tensor.view(), 1).unwrap();
        for compute in Compute::ALL {
            for m in [1, 3, 8, 40] {
                let x = &values[..m * k];
                let x = MatRef::from_f32(x, m, k);
                let mut y = vec![0.0f32; m * n];
                let o = Options { compute, ..Options::default() };
                let mut call = || {
                    let before = COUNT.get();
                    let done = matmul(&x, &w, &mut MatMut::from_f32(&mut y, m, n), &o);
                    done.is_ok().then(|| COUNT.get() - before)
                };
                // The first two calls may grow the thread's buffers; what a format lacks is refused every time.
                if call().is_some() {
                    call();
                    assert_eq!(call(), Some(0), "{name}, {compute}, M = {m}");
                }
            }
        }
    }
}
