//! The portable implementation of the vector operations: the definition the others are held to.
use super::simd::{ops, Simd};

/// Sixteen lanes in plain Rust.
#[derive(Debug)]
pub struct Scalar;

type I = [i32; 16];
type F = [f32; 16];

#[inline(always)]
fn bytes(a: I) -> [u8; 64] {
    let mut out = [0; 64];
    for (o, v) in out.chunks_exact_mut(4).zip(a) {
        o.copy_from_slice(&v.to_le_bytes());
    }
    out
}

#[inline(always)]
fn lanes(b: [u8; 64]) -> I {
    std::array::from_fn(|i| i32::from_le_bytes([b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3]]))
}

#[inline(always)]
fn halves(a: i32, f: impl Fn(u16) -> u16) -> i32 {
    let a = a as u32;
    (u32::from(f(a as u16)) | (u32::from(f((a >> 16) as u16)) << 16)) as i32
}

#[inline(always)]
fn zip<T: Copy, U: Copy, R>(a: [T; 16], b: [U; 16], f: impl Fn(T, U) -> R) -> [R; 16] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn dot(acc: I, u: I, s: I) -> I {
    let (x, y) = (bytes(u), bytes(s));
    std::array::from_fn(|i| {
        (0..4).fold(acc[i], |t, j| t.wrapping_add(i32::from(x[4 * i + j]) * i32::from(y[4 * i + j] as i8)))
    })
}

// SAFETY: plain Rust; the pointer contracts are the trait's.
unsafe impl Simd for Scalar {
    type I = I;
    type F = F;
    ops! {
        load(p: *const u8) -> I = lanes(p.cast::<[u8; 64]>().read_unaligned());
        store(p: *mut u8, v: I) -> () = p.cast::<[u8; 64]>().write_unaligned(bytes(v));
        splat8(v: u8) -> I = [i32::from_le_bytes([v; 4]); 16];
        splat(v: i32) -> I = [v; 16];
        and(a: I, b: I) -> I = zip(a, b, |x, y| x & y);
        or(a: I, b: I) -> I = zip(a, b, |x, y| x | y);
        shr(a: I, n: usize) -> I = a.map(|v| halves(v, |h| h >> n));
        shl(a: I, n: usize) -> I = a.map(|v| halves(v, |h| h << n));
        add8(a: I, b: I) -> I = { let (x, y) = (bytes(a), bytes(b)); lanes(std::array::from_fn(|i| x[i].wrapping_add(y[i]))) };
        sub8(a: I, b: I) -> I = { let (x, y) = (bytes(a), bytes(b)); lanes(std::array::from_fn(|i| x[i].wrapping_sub(y[i]))) };
        add(a: I, b: I) -> I = zip(a, b, i32::wrapping_add);
        sub(a: I, b: I) -> I = zip(a, b, i32::wrapping_sub);
        mul(a: I, b: I) -> I = zip(a, b, i32::wrapping_mul);
        mul16(a: I, b: I) -> I = zip(a, b, |x, y| {
            let low = (x as u16).wrapping_mul(y as u16);
            let high = ((x >> 16) as u16).wrapping_mul((y >> 16) as u16);
            (u32::from(low) | (u32::from(high) << 16)) as i32
        });
        mulhi16(a: I, b: I) -> I = zip(a, b, |x, y| {
            let high = |x: i32, y: i32| ((x as u32 & 0xffff) * (y as u32 & 0xffff)) >> 16;
            (high(x, y) | (high((x as u32 >> 16) as i32, (y as u32 >> 16) as i32) << 16)) as i32
        });
        add16(a: I, b: I) -> I = zip(a, b, |x, y| {
            let low = (x as u16).wrapping_add(y as u16);
            let high = ((x >> 16) as u16).wrapping_add((y >> 16) as u16);
            (u32::from(low) | (u32::from(high) << 16)) as i32
        });
        shl16(a: I, n: usize) -> I = a.map(|v| halves(v, |h| h << n));
        shr16(a: I, n: usize) -> I = a.map(|v| halves(v, |h| h >> n));
        xor(a: I, b: I) -> I = zip(a, b, |x, y| x ^ y);
        maxu(a: I, b: I) -> I = zip(a, b, |x, y| (x as u32).max(y as u32) as i32);
        top(a: I) -> u32 = a.into_iter().fold(0, |t, v| t.max(v as u32));
        dot(acc: I, u: I, s: I) -> I = dot(acc, u, s);
        dot7(acc: I, u: I, s: I) -> I = dot(acc, u, s);
        load_u8(p: *const u8) -> I = p.cast::<[u8; 16]>().read_unaligned().map(i32::from);
        store_i8(p: *mut i8, v: I) -> () = p.cast::<[i8; 16]>().write_unaligned(v.map(|x| x as i8));
        store_i8x4(p: *mut i8, v: [I; 4]) -> () = p.cast::<[[i8; 16]; 4]>().write_unaligned(v.map(|v| v.map(|x| x as i8)));
        cvt(a: I) -> F = a.map(|v| v as f32);
        rint(a: F) -> I = a.map(|v| v.round_ties_even() as i32);
        magic(a: I, j: usize) -> F = a.map(|v| f32::from_bits(0x4B00_0000 | ((v as u32 >> (8 * j)) & 0xff)));
        bits(a: F) -> I = a.map(|v| v.to_bits() as i32);
        from_bits(a: I) -> F = a.map(|v| f32::from_bits(v as u32));
        loadf(p: *const f32) -> F = p.cast::<F>().read_unaligned();
        storef(p: *mut f32, v: F) -> () = p.cast::<F>().write_unaligned(v);
        splatf(v: f32) -> F = [v; 16];
        load_f16(p: *const u16) -> F = p.cast::<[u16; 16]>().read_unaligned().map(|h| half::f16::from_bits(h).to_f32());
        load_bf16(p: *const u16) -> F = p.cast::<[u16; 16]>().read_unaligned().map(|h| f32::from_bits(u32::from(h) << 16));
        addf(a: F, b: F) -> F = zip(a, b, |x, y| x + y);
        subf(a: F, b: F) -> F = zip(a, b, |x, y| x - y);
        mulf(a: F, b: F) -> F = zip(a, b, |x, y| x * y);
        divf(a: F, b: F) -> F = zip(a, b, |x, y| x / y);
        minf(a: F, b: F) -> F = zip(a, b, f32::min);
        maxf(a: F, b: F) -> F = zip(a, b, f32::max);
        fma(a: F, b: F, c: F) -> F = std::array::from_fn(|i| a[i].mul_add(b[i], c[i]));
        shr32_16(a: I) -> I = a.map(|v| (v as u32 >> 16) as i32);
        shr32(a: I, n: usize) -> I = a.map(|v| (v as u32 >> n) as i32);
        shl32(a: I, n: usize) -> I = a.map(|v| v << n);
        sar(a: I, n: usize) -> I = a.map(|v| v >> n);
        lut16(table: F, lane: I) -> F = lane.map(|v| table[(v & 15) as usize]);
        lut64(table: *const f32, lane: I) -> F = lane.map(|v| *table.add((v & 63) as usize));
        gather(table: *const f32, lane: I) -> F = lane.map(|v| *table.add(v as usize));
        pairs(table: *const f32, at: *const u16) -> [F; 2] = {
            let at = at.cast::<[u16; 16]>().read_unaligned();
            std::array::from_fn(|j| at.map(|i| *table.add(usize::from(i) + j)))
        };
        quads(table: *const f32, at: *const u16) -> [F; 4] = {
            let at = at.cast::<[u16; 16]>().read_unaligned();
            std::array::from_fn(|j| at.map(|i| *table.add(usize::from(i) + j)))
        };
        repeat16(p: *const u8) -> I = {
            let b = p.cast::<[u8; 16]>().read_unaligned();
            lanes(std::array::from_fn(|i| b[i % 16]))
        };
        shuffle(table: I, u: I) -> I = {
            let (t, u) = (bytes(table), bytes(u));
            lanes(std::array::from_fn(|i| t[i / 16 * 16 + (u[i] & 15) as usize]))
        };
        pick(u: I, bit: u8, a: I, b: I) -> I = {
            let (u, a, b) = (bytes(u), bytes(a), bytes(b));
            lanes(std::array::from_fn(|i| if u[i] & bit == 0 { a[i] } else { b[i] }))
        };
        xor_sign(a: I) -> I = a.map(|v| v ^ i32::MIN);
        any_gt(a: F, b: F) -> bool = a.iter().zip(b).any(|(x, y)| *x > y);
        prefetch(_p: *const u8) -> () = ();
        prefetch_l2(_p: *const u8) -> () = ();
        prefetch_write(_p: *const u8) -> () = ();
    }
}
