//! AMX tiles in software, so that their kernels can be tested where no CPU has them: the feature `emulated-tiles`, which no
//! build for users has.
//!
//! A tile instruction raises SIGILL on such a CPU. The handler decodes it, does what the Intel Software Developer's Manual
//! (volume 2, chapter 3 and 4, the instructions by name) says it does, and goes on behind it. Each costs a microsecond or so.
use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

/// The tiles of a thread: the dimensions of their configuration, and their rows of 64 bytes.
struct State {
    configured: bool,
    rows: [u8; 8],
    /// Bytes of a row.
    cols: [u16; 8],
    data: [[[u8; 64]; 16]; 8],
}

thread_local! {
    static TILES: UnsafeCell<State> = const {
        UnsafeCell::new(State { configured: false, rows: [0; 8], cols: [0; 8], data: [[[0; 64]; 16]; 8] })
    };
}

/// Takes over SIGILL, once; false where the system refuses.
pub fn install() -> bool {
    static DONE: OnceLock<bool> = OnceLock::new();
    *DONE.get_or_init(|| {
        // SAFETY: the handler has the signature that SA_SIGINFO asks for; the old action is not wanted.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()) == 0
        }
    })
}

extern "C" fn handle(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes the context of the thread, which nothing else touches while the handler runs.
    unsafe {
        let gregs = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rip = gregs[libc::REG_RIP as usize] as usize;
        let done = TILES.with(|t| execute(&mut *t.get(), rip, |register| gregs[PLACES[register] as usize] as usize));
        match done {
            Some(length) => gregs[libc::REG_RIP as usize] += length as i64,
            // Not a tile instruction, or a wrong one: it is met again, and ends the process.
            None => {
                libc::signal(libc::SIGILL, libc::SIG_DFL);
            }
        }
    }
}

/// Where a context holds the registers, in the order of their codes.
const PLACES: [c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// A memory operand: its address without an index, the index times its scale, and the bytes of the instruction up to its end.
struct Memory {
    address: usize,
    index: usize,
    length: usize,
}

/// Decodes what follows `ModRM`; `x` and `b` are the bits that widen the numbers of index and base.
unsafe fn memory(rip: usize, x: usize, b: usize, register: impl Fn(usize) -> usize) -> Option<Memory> {
    // SAFETY: bytes of the instruction that the thread was to execute.
    let byte = |i: usize| unsafe { *((rip + i) as *const u8) };
    // SAFETY: as above.
    let word = |i: usize| unsafe { ((rip + i) as *const i32).read_unaligned() } as isize;
    let (mode, rm) = (byte(4) >> 6, usize::from(byte(4) & 7));
    let (mut length, mut index, mut base) = (5, 0, Some(rm | b << 3));
    if rm == 4 {
        let sib = usize::from(byte(5));
        length = 6;
        let of = sib >> 3 & 7 | x << 3;
        index = if of == 4 { 0 } else { register(of) << (sib >> 6) };
        base = (mode != 0 || sib & 7 != 5).then_some(sib & 7 | b << 3);
    } else if mode == 0 && rm == 5 {
        return Some(Memory { address: (rip + 9).wrapping_add_signed(word(5)), index: 0, length: 9 });
    }
    let offset = match (mode, base) {
        (1, _) => isize::from(byte(length) as i8),
        (2, _) | (0, None) => word(length),
        (0, _) => 0,
        _ => return None,
    };
    length += match (mode, base) {
        (1, _) => 1,
        (2, _) | (0, None) => 4,
        _ => 0,
    };
    Some(Memory { address: base.map_or(0, register).wrapping_add_signed(offset), index, length })
}

/// Does the tile instruction at `rip`: its length, or `None` where it is none or not allowed.
unsafe fn execute(t: &mut State, rip: usize, register: impl Fn(usize) -> usize) -> Option<usize> {
    // SAFETY: bytes of the instruction that the thread was to execute, and memory that it names.
    unsafe {
        let code = (rip as *const [u8; 5]).read();
        // VEX of three bytes, map 0F38, 128 bits, W0.
        if code[0] != 0xc4 || code[1] & 0x1f != 2 || code[2] & 0x84 != 0 {
            return None;
        }
        let (x, b) = (usize::from(!code[1] >> 6 & 1), usize::from(!code[1] >> 5 & 1));
        let (prefix, third) = (code[2] & 3, usize::from(!code[2] >> 3 & 15));
        let (registers, first, second) = (code[4] >> 6 == 3, usize::from(code[4] >> 3 & 7), usize::from(code[4] & 7));
        if code[3] != 0x49 && !t.configured {
            return None;
        }
        match (code[3], prefix, registers) {
            // LDTILECFG
            (0x49, 0, false) => {
                let m = memory(rip, x, b, register)?;
                let c = ((m.address + m.index) as *const [u8; 64]).read();
                if c[0] != 1 || c[1] != 0 || c[2..16].iter().chain(&c[32..48]).chain(&c[56..]).any(|&v| v != 0) {
                    return None;
                }
                for i in 0..8 {
                    (t.rows[i], t.cols[i]) = (c[48 + i], u16::from_le_bytes([c[16 + 2 * i], c[17 + 2 * i]]));
                    if t.rows[i] > 16 || t.cols[i] > 64 || (t.rows[i] == 0) != (t.cols[i] == 0) {
                        return None;
                    }
                }
                t.data = [[[0; 64]; 16]; 8];
                t.configured = true;
                Some(m.length)
            }
            // TILERELEASE
            (0x49, 0, true) if code[4] == 0xc0 => {
                t.configured = false;
                Some(5)
            }
            // TILEZERO
            (0x49, 3, true) if t.configured => {
                t.data[first] = [[0; 64]; 16];
                Some(5)
            }
            // TILELOADD, TILELOADDT1: what is past the configured rows and columns becomes 0.
            (0x4b, 3 | 1, false) if second == 4 => {
                let m = memory(rip, x, b, register)?;
                t.data[first] = [[0; 64]; 16];
                for r in 0..usize::from(t.rows[first]) {
                    let from = m.address.wrapping_add(r.wrapping_mul(m.index)) as *const u8;
                    let cols = usize::from(t.cols[first]);
                    t.data[first][r][..cols].copy_from_slice(std::slice::from_raw_parts(from, cols));
                }
                Some(m.length)
            }
            // TILESTORED
            (0x4b, 2, false) if second == 4 => {
                let m = memory(rip, x, b, register)?;
                for r in 0..usize::from(t.rows[first]) {
                    let to = m.address.wrapping_add(r.wrapping_mul(m.index)) as *mut u8;
                    to.copy_from_nonoverlapping(t.data[first][r].as_ptr(), usize::from(t.cols[first]));
                }
                Some(m.length)
            }
            // TDPBUUD, TDPBUSD, TDPBSUD, TDPBSSD; TDPBF16PS
            (0x5e, _, true) | (0x5c, 2, true) => {
                if first == second || first == third || second == third || third > 7 {
                    return None;
                }
                let (rows, cols, depth) = (t.rows[first], t.cols[first], t.cols[second]);
                let fits = t.rows[second] == rows && u16::from(t.rows[third]) * 4 == depth && t.cols[third] == cols;
                if !fits || cols % 4 != 0 || depth % 4 != 0 {
                    return None;
                }
                for m in 0..usize::from(rows) {
                    for n in 0..usize::from(cols) / 4 {
                        let pairs = (0..usize::from(depth) / 4).map(|k| {
                            let a: [u8; 4] = std::array::from_fn(|i| t.data[second][m][4 * k + i]);
                            (a, std::array::from_fn(|i| t.data[third][k][4 * n + i]))
                        });
                        let old: [u8; 4] = std::array::from_fn(|i| t.data[first][m][4 * n + i]);
                        let new = if code[3] == 0x5c {
                            floats(f32::from_le_bytes(old), pairs).to_le_bytes()
                        } else {
                            integers(i32::from_le_bytes(old), pairs, prefix).to_le_bytes()
                        };
                        t.data[first][m][4 * n..][..4].copy_from_slice(&new);
                    }
                }
                Some(5)
            }
            _ => None,
        }
    }
}

type Four = [u8; 4];

fn integers(c: i32, pairs: impl Iterator<Item = (Four, Four)>, prefix: u8) -> i32 {
    let wide = |v: u8, signed: bool| if signed { i32::from(v as i8) } else { i32::from(v) };
    // 0: both unsigned, 1: the second signed, 2: the first, 3: both.
    let (sa, sb) = (prefix & 2 != 0, prefix & 1 != 0);
    pairs.fold(c, |c, (a, b)| (0..4).fold(c, |c, i| c.wrapping_add(wide(a[i], sa) * wide(b[i], sb))))
}

/// Sums of even and of odd places, denormals taken as 0, added to each other and then to `c`.
fn floats(c: f32, pairs: impl Iterator<Item = (Four, Four)>) -> f32 {
    let flush = |v: f32| if v.is_subnormal() { 0f32.copysign(v) } else { v };
    let part = |q: Four, i: usize| flush(f32::from_bits(u32::from(u16::from_le_bytes([q[2 * i], q[2 * i + 1]])) << 16));
    let sums = pairs.fold([0f32; 2], |s, (a, b)| std::array::from_fn(|i| flush(part(a, i).mul_add(part(b, i), s[i]))));
    flush(flush(c) + flush(sums[0] + sums[1]))
}
