//! Which kernel, which blocking, how many threads: a pure function of the shape, the format, the compute and the ISA.
use crate::activation::Segments;
use crate::gemm::{few, Compute};
use crate::isa::Isa;
use crate::kernel;
use crate::pack::{Geometry, Packed, BLOCK, PANEL};
use crate::sparse::floats::FloatPanels;
use crate::sparse::Panels;
use std::fmt;

/// The loop nest a plan uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Vector kernel that unpacks codes in registers.
    Fused,
    /// Codes unpacked to bytes in cache first, then a vector kernel.
    Bytes,
    /// Codes decoded to bytes in cache first, then int8 tiles.
    Tiles,
    /// Codes decoded to floats in registers.
    Gemv,
    /// Codes decoded to floats in cache first.
    Gemm,
    /// Codes decoded to bf16 in cache first, then bf16 tiles.
    TilesBf16,
    /// Rows of activations side by side, and one kept number for all of them at a time.
    Lanes,
}

/// A decision, printable.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Level of the kernels.
    pub isa: Isa,
    /// Compute class asked for.
    pub compute: Compute,
    /// Loop nest and how it is cut.
    pub blocking: Blocking,
    /// (M, N, K).
    pub shape: (usize, usize, usize),
    /// Bytes of codes, scales and zeros read.
    pub weight_bytes: usize,
    /// Share of the entries that are counted as multiplied.
    pub share: f64,
    /// Places of K after padding groups.
    pub padded_k: usize,
    /// Kernel name.
    pub kernel: String,
    /// Format name.
    pub format: String,
    /// Places of K between two applications of a scale.
    pub segment: usize,
}

/// Rows of a task of the dense float loop nest, at most: a multiple of the register tiles of every ISA.
const FLOAT_ROWS: usize = 252;

/// The longest segment of the fused kernels, whose int32 sums are of bytes up to 255.
const FUSED_SEGMENT: usize = 1 << 16;

/// Products smaller than this stay on the caller's thread.
const SMALL: usize = 1 << 18;

/// What the loop nest needs of a plan; cheap to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocking {
    /// Loop nest.
    pub path: Path,
    /// Activation rows of a register tile.
    pub mr: usize,
    /// Panels of a register tile.
    pub np: usize,
    /// Panels of a task.
    pub task_panels: usize,
    /// Rows of a task.
    pub task_rows: usize,
    /// Blocks of K decoded at a time (0: all).
    pub window: usize,
    /// Threads.
    pub threads: usize,
    /// Tasks.
    pub tasks: usize,
}

impl Blocking {
    pub(crate) fn cut(mut self, m: usize, panels: usize, n: usize, k: usize, threads: usize, align: usize) -> Self {
        self.threads = if m * n * k < SMALL { 1 } else { threads.max(1) };
        // Enough tasks for the threads to even out, none smaller than a register tile: cores of a shared machine differ by
        // half in speed.
        let want = if self.threads == 1 { 1 } else { 8 * self.threads };
        self.task_rows = self.task_rows.max(1);
        let rows_tasks = m.div_ceil(self.task_rows);
        let by_n = want.div_ceil(rows_tasks.max(1)).max(1);
        let even = panels.div_ceil(by_n).next_multiple_of(align).max(align);
        self.task_panels = self.task_panels.max(align).min(even);
        self.tasks = rows_tasks * panels.div_ceil(self.task_panels);
        self
    }
}

/// Rows of a task of bf16 tiles: with K of 4096 they take half of the second-level cache.
const BF16_ROWS: usize = 128;

/// Whether decoded values fit a signed byte, so that tiles need no correction.
pub(crate) fn signed_bytes(w: &Packed) -> bool {
    let top = w.mul * w.byte_top;
    !w.sums_have_zeros() && -w.sum_sub() >= -128 && top - w.sum_sub() <= 127
}

/// Blocking of an integer product.
pub(crate) fn int8(m: usize, w: &Packed, segs: &Segments, act: bool, isa: Isa, threads: usize) -> Blocking {
    let t = kernel::table(isa);
    let raw = w.sum_groups() <= 1 && !act;
    let panels = w.panels();
    let (n, k) = (w.n, w.geometry.k);
    if let Some(trellis) = w.trellis() {
        let (_, mr) = (t.trellis)(w.bits, trellis.hash, m);
        let b = Blocking { path: Path::Fused, mr, np: 1, task_panels: 16, task_rows: m, window: 0, threads, tasks: 1 };
        return b.cut(m, panels, n, k, threads, 1);
    }
    let base =
        Blocking { path: Path::Bytes, mr: 1, np: 1, task_panels: 16, task_rows: m, window: 0, threads, tasks: 1 };
    // Half a tile of rows is enough where sums are stored seldom and need no correction.
    let few = w.sparse.is_none() && (raw || (segs.len > BLOCK && signed_bytes(w)));
    let sparse = w.sparse.as_ref().filter(|_| !act);
    let direct = sparse.and_then(Panels::direct_rows).unwrap_or(if few { 4 } else { 8 });
    if isa == Isa::Amx && m > direct && (raw || segs.len >= 16) {
        let b = Blocking { path: Path::Tiles, mr: 32, np: 2, task_panels: 16, task_rows: m.min(256), ..base };
        return b.cut(m, panels, n, k, threads, 2);
    }
    let mr = match m {
        1 => 1,
        2 => 2,
        3..=4 => 4,
        _ => t.max_mr,
    }
    .min(t.max_mr);
    let mr = if sparse.is_some_and(|p| p.by_row(m, isa)) { 1 } else { mr };
    // The sums of short groups and of eight rows do not fit the registers: four rows twice, the second time from the cache.
    let mr = if m <= 8 && !raw && segs.registers() < 16 && w.bits == 4 && w.sparse.is_none() { mr.min(4) } else { mr };
    let inner = w.inner.as_ref().filter(|_| raw && w.geometry.kp <= crate::gemm::int32_limit(w));
    let fused = match (raw, w.is_table()) {
        _ if inner.is_some() => {
            inner.and_then(|i| (t.inner)(w.bits, w.has_zeros(), i.groups.registers(), mr, false)).map(|f| f.1)
        }
        _ if w.inner.is_some() => None,
        (true, false) => (t.raw)(w.bits, mr).map(|f| f.1),
        (true, true) => (t.raw_table)(w.looked_up_bits(), mr).map(|f| f.1),
        (false, false) => (t.grouped)(w.bits, w.sums_have_zeros(), segs.registers(), mr).map(|f| f.1),
        (false, true) => (t.grouped_table)(w.looked_up_bits(), segs.registers(), mr).map(|f| f.1),
    };
    if let (Some(np), true) = (fused, w.sparse.is_none() && m <= 8 && (raw || segs.len <= FUSED_SEGMENT)) {
        let b = Blocking { path: Path::Fused, mr, np, task_panels: 16, ..base };
        return b.cut(m, panels, n, k, threads, np);
    }
    let window = if raw { 16 } else { (16 / segs.blocks().max(1)).max(1) * segs.blocks().max(1) };
    let b = Blocking { mr, task_panels: 8, task_rows: m.min(512), window, ..base };
    b.cut(m, panels, n, k, threads, 1)
}

/// Blocking of a float product.
pub(crate) fn float(m: usize, w: &Packed, bf16: bool, isa: Isa, threads: usize) -> Blocking {
    let t = kernel::table(isa);
    let (n, k) = (w.n, w.geometry.k);
    let base = Blocking { path: Path::Gemm, mr: 1, np: 1, task_panels: 16, task_rows: m, window: 3, threads, tasks: 1 };
    // Whole tiles of codes that are read together.
    let dense = w.dense.is_some();
    let step = w.sparse.as_ref().and_then(Panels::step);
    let base = Blocking { window: if dense { 4 } else { step.unwrap_or(base.window) }, ..base };
    if bf16 && isa == Isa::Amx && m > 8 {
        let b = Blocking {
            path: Path::TilesBf16,
            mr: 32,
            np: 2,
            task_panels: 16,
            task_rows: m.min(BF16_ROWS),
            window: 0,
            ..base
        };
        return b.cut(m, w.panels(), n, k, threads, 2);
    }
    let most = match (&w.floats, &w.sparse) {
        (Some(p), _) => Some(p.few_rows(isa)),
        (_, p) => p.as_ref().and_then(|p| p.few_float_rows(isa, bf16)),
    };
    if m <= most.unwrap_or(4) && !dense {
        let mr = few(m).min(t.max_mr);
        let np = w.floats.as_ref().map_or_else(|| (t.gemv)(0, false, mr, false).1, |p| p.gemv_panels(isa, mr));
        let b = Blocking { path: Path::Gemv, mr, np, window: base.window.max(8), ..base };
        return b.cut(m, w.panels(), n, k, threads, np);
    }
    // Even tasks, in whole register tiles: a last task of a few rows would decode the weights for them alone.
    let task_rows = |mr: usize| m.div_ceil(m.div_ceil(FLOAT_ROWS).max(1)).next_multiple_of(mr).min(m.max(1));
    if let Some(lanes) = w.floats.as_ref().and_then(|p| p.lanes(isa, m)) {
        let b =
            Blocking { path: Path::Lanes, mr: lanes, task_panels: 8, task_rows: task_rows(lanes), window: 4, ..base };
        return b.cut(m, w.panels(), n, k, threads, 1);
    }
    let task_rows = task_rows(t.gemm_mr);
    let b = Blocking { mr: t.gemm_mr, np: t.gemm_np, task_panels: 8, task_rows, ..base };
    b.cut(m, w.panels(), n, k, threads, t.gemm_np)
}

/// The plan of `m` rows against `w`.
///
/// # Errors
/// [`crate::Error::Unsupported`] where the compute does not fit the format.
pub fn plan(m: usize, w: &Packed, compute: Compute, isa: Isa, threads: usize) -> crate::Result<Plan> {
    compute.check()?;
    let (mut b, class, segment) = match compute {
        Compute::Int8 { group } => {
            w.check_integers(group.map(|g| g as usize))?;
            let segs = w.segments(group.map(|g| g as usize))?;
            let raw = w.sum_groups() <= 1 && group.is_none();
            let b = int8(m, w, &segs, group.is_some(), isa, threads);
            let unit = match b.path {
                Path::Fused if w.trellis().is_some() => format!("h{}", w.bits),
                Path::Fused if w.is_table() => format!("t{}", w.bits),
                Path::Fused => format!("u{}", w.bits),
                _ => "u8".to_owned(),
            };
            let unit = if w.inner.is_some() { unit + "x2" } else { unit };
            let raw = raw && w.trellis().is_none();
            let class = format!("{}_s8_{unit}{}", if raw { "i32" } else { "f32" }, if raw { "" } else { "g" });
            (b, class, if raw { w.geometry.kp } else { segs.len })
        }
        Compute::F32 => (float(m, w, false, isa, threads), "f32_f32_f32".to_owned(), w.geometry.padded),
        Compute::Bf16 => (float(m, w, true, isa, threads), "f32_bf16_bf16".to_owned(), w.geometry.padded),
    };
    b.threads = b.threads.min(b.tasks.max(1));
    let tiles = matches!(b.path, Path::Tiles | Path::TilesBf16);
    if tiles {
        b.mr = 32;
    }
    let kr = match b.path {
        Path::Tiles => 64,
        Path::TilesBf16 => 32,
        Path::Gemv | Path::Gemm | Path::Lanes => 1,
        _ => 4,
    };
    let isa_name = if tiles { isa } else { kernel::table(isa).isa };
    Ok(Plan {
        isa,
        compute,
        shape: (m, w.n, w.geometry.k),
        weight_bytes: w.nbytes(),
        share: w.floats.as_ref().map_or(1.0, FloatPanels::share),
        padded_k: w.geometry.kp,
        kernel: format!("{class}_{}x{}k{kr}_{isa_name}", b.mr, b.np * PANEL),
        format: w.format.to_string(),
        segment,
        blocking: b,
    })
}

/// Weights up to this size are expected in the last-level cache when they are used again.
const CACHED: usize = 64 << 20;

impl Plan {
    /// Operations counted as `2*M*N*K`, without those of dropped numbers that are left out; of codes all are counted.
    pub fn operations(&self) -> f64 {
        let (m, n, k) = self.shape;
        2.0 * m as f64 * n as f64 * k as f64 * self.share
    }

    /// Bytes that must be read or written: the weight, float32 activations, float32 results.
    pub fn bytes(&self) -> f64 {
        let (m, n, k) = self.shape;
        self.weight_bytes as f64 + 4.0 * m as f64 * (k + n) as f64
    }

    /// Seconds that the reference machine of `docs/performance.md` cannot do it in: its bytes at the bandwidth of where the
    /// weight is expected to be, or its operations at the peak of the level, whichever takes longer.
    pub fn floor(&self) -> f64 {
        let t = self.blocking.threads as f64;
        let bandwidth = if self.weight_bytes <= CACHED { 29e9 } else { 16e9 };
        let int8 = matches!(self.compute, Compute::Int8 { .. });
        let peak = match self.isa {
            Isa::Amx if int8 => 6150e9,
            Isa::Amx if self.compute == Compute::Bf16 => 3120e9,
            Isa::Amx | Isa::Avx512Vnni if int8 => 810e9,
            // Not measured: twice that of AVX2.
            Isa::Avx512 if int8 => 400e9,
            Isa::AvxVnni if int8 => 465e9,
            Isa::Avx2 if int8 => 200e9,
            Isa::Amx | Isa::Avx512Vnni | Isa::Avx512 => 214e9,
            Isa::AvxVnni | Isa::Avx2 => 112e9,
            // Not measured: one fused multiply-add a cycle.
            Isa::Scalar => 7e9,
        };
        (self.bytes() / (bandwidth * t)).max(self.operations() / (peak * t))
    }

    /// Seconds that the reference machine is expected to take, roughly: round figures for the rates of its kernels, the
    /// preparation of the activations, and the call itself.
    pub fn predicted(&self) -> f64 {
        let (m, n, k) = self.shape;
        let t = self.blocking.threads as f64;
        let vector = |amx: f64, vnni512: f64, avx512: f64, vnni: f64, avx2: f64| match self.isa {
            Isa::Amx => amx,
            Isa::Avx512Vnni => vnni512,
            Isa::Avx512 => avx512,
            Isa::AvxVnni => vnni,
            Isa::Avx2 => avx2,
            Isa::Scalar => 0.5e9,
        };
        let rate = match self.blocking.path {
            // A tile step of 32 x 32 x 64, and a flush of its sums at every segment.
            Path::Tiles => 131_072.0 / (70e-9 + 75e-9 * 64.0 / self.segment.max(32) as f64),
            Path::TilesBf16 => 550e9,
            Path::Fused => vector(330e9, 330e9, 170e9, 140e9, 120e9),
            Path::Bytes => vector(300e9, 300e9, 170e9, 180e9, 100e9),
            Path::Gemv | Path::Gemm => vector(155e9, 155e9, 155e9, 75e9, 75e9),
            // Places that rows of a panel do not fill, and two loads for each multiply-add.
            Path::Lanes => vector(40e9, 40e9, 40e9, 30e9, 30e9),
        };
        let bandwidth = match (self.blocking.path, self.weight_bytes <= CACHED) {
            (Path::Gemv, _) => vector(10e9, 10e9, 10e9, 3.2e9, 3.2e9),
            (_, true) => 26e9,
            (_, false) => 13e9,
        };
        let int8 = matches!(self.compute, Compute::Int8 { .. });
        let prepare = if int8 { (m * k) as f64 / 4e9 } else { 0.0 };
        let work = (self.operations() / rate).max(self.weight_bytes as f64 / bandwidth);
        1e-6 + (prepare + work + (4 * m * n) as f64 / 10e9) / t
    }

    /// The plan as (name, value) pairs.
    pub fn fields(&self) -> Vec<(&'static str, String)> {
        let (m, n, k) = self.shape;
        let b = &self.blocking;
        vec![
            ("kernel", self.kernel.clone()),
            ("format", self.format.clone()),
            ("compute", self.compute.to_string()),
            ("isa", self.isa.to_string()),
            ("path", format!("{:?}", b.path).to_lowercase()),
            ("m", m.to_string()),
            ("n", n.to_string()),
            ("k", k.to_string()),
            ("padded_k", self.padded_k.to_string()),
            ("task_rows", b.task_rows.to_string()),
            ("task_columns", (b.task_panels * PANEL).to_string()),
            ("window_k", (b.window * 64).to_string()),
            ("tasks", b.tasks.to_string()),
            ("threads", b.threads.to_string()),
            ("weight_bytes", self.weight_bytes.to_string()),
            ("bytes", format!("{:.0}", self.bytes())),
            ("operations", format!("{:.0}", self.operations())),
            ("floor_us", format!("{:.1}", self.floor() * 1e6)),
            ("predicted_us", format!("{:.1}", self.predicted() * 1e6)),
        ]
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (name, value)) in self.fields().iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{name:>13}  {value}")?;
        }
        Ok(())
    }
}

/// Padding that a group length costs: places over values.
pub fn padding(g: &Geometry) -> f64 {
    if g.k == 0 {
        1.0
    } else {
        g.kp as f64 / g.k as f64
    }
}
