//! Which kernel, which blocking, how many threads: a pure function of the shape, the format, the compute and the ISA.
use crate::activation::Segments;
use crate::gemm::Compute;
use crate::isa::Isa;
use crate::kernel;
use crate::pack::{Geometry, Packed, PANEL};
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
}

/// A decision, printable.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Level of the kernels.
    pub isa: Isa,
    /// Compute class asked for.
    pub compute: Compute,
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
    /// (M, N, K).
    pub shape: (usize, usize, usize),
    /// Bytes of codes, scales and zeros read.
    pub weight_bytes: usize,
    /// Places of K after padding groups.
    pub padded_k: usize,
    /// Kernel name.
    pub kernel: String,
    /// Format name.
    pub format: String,
}

/// Rows of a task of the dense float loop nest, at most: a multiple of the register tiles of every ISA.
const FLOAT_ROWS: usize = 252;

/// Products smaller than this stay on the caller's thread.
const SMALL: usize = 1 << 18;

/// What the loop nest needs of a plan; cheap to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blocking {
    pub path: Path,
    pub mr: usize,
    pub np: usize,
    pub task_panels: usize,
    pub task_rows: usize,
    pub window: usize,
    pub threads: usize,
    pub tasks: usize,
}

impl Blocking {
    fn cut(mut self, m: usize, panels: usize, n: usize, k: usize, threads: usize, align: usize) -> Self {
        self.threads = if m * n * k < SMALL { 1 } else { threads.max(1) };
        // Enough tasks for the threads to even out, none smaller than a register tile.
        let want = if self.threads == 1 { 1 } else { 4 * self.threads };
        self.task_rows = self.task_rows.max(1);
        let rows_tasks = m.div_ceil(self.task_rows);
        let by_n = want.div_ceil(rows_tasks.max(1)).max(1);
        let even = panels.div_ceil(by_n).next_multiple_of(align).max(align);
        self.task_panels = self.task_panels.max(align).min(even);
        self.tasks = rows_tasks * panels.div_ceil(self.task_panels);
        self
    }
}

/// Whether decoded values fit a signed byte, so that tiles need no correction.
pub(crate) fn signed_bytes(w: &Packed) -> bool {
    let top = w.mul * ((1 << w.bits) - 1);
    !w.has_zeros() && -w.sub >= -128 && top - w.sub <= 127
}

/// Blocking of an integer product.
pub(crate) fn int8(m: usize, w: &Packed, segs: &Segments, act: bool, isa: Isa, threads: usize) -> Blocking {
    let t = kernel::table(isa);
    let raw = w.geometry.groups <= 1 && !act;
    let panels = w.panels();
    let (n, k) = (w.n, w.geometry.k);
    let base =
        Blocking { path: Path::Bytes, mr: 1, np: 1, task_panels: 16, task_rows: m, window: 0, threads, tasks: 1 };
    if isa == Isa::Amx && m > 8 && (raw || segs.len >= 32) {
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
    let fused = if raw {
        (t.raw)(w.bits, mr).map(|f| f.1)
    } else {
        (t.grouped)(w.bits, w.has_zeros(), segs.registers(), mr).map(|f| f.1)
    };
    if let (Some(np), true) = (fused, m <= 8) {
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
    if bf16 && isa == Isa::Amx && m > 8 {
        let b =
            Blocking { path: Path::TilesBf16, mr: 32, np: 2, task_panels: 2, task_rows: m.min(256), window: 0, ..base };
        return b.cut(m, w.panels(), n, k, threads, 2);
    }
    if m <= 4 {
        let mr = if m == 3 { 2 } else { m }.min(t.max_mr);
        let (_, np) = (t.gemv)(0, false, mr, false);
        let b = Blocking { path: Path::Gemv, mr, np, window: 8, ..base };
        return b.cut(m, w.panels(), n, k, threads, np);
    }
    // Even tasks, in whole register tiles: a last task of a few rows would decode the weights for them alone.
    let task_rows = m.div_ceil(m.div_ceil(FLOAT_ROWS).max(1)).next_multiple_of(t.gemm_mr).min(m.max(1));
    let b = Blocking { mr: t.gemm_mr, np: t.gemm_np, task_panels: 8, task_rows, ..base };
    b.cut(m, w.panels(), n, k, threads, t.gemm_np)
}

/// The plan of `m` rows against `w`.
///
/// # Errors
/// [`crate::Error::Unsupported`] where the compute does not fit the format.
pub fn plan(m: usize, w: &Packed, compute: Compute, isa: Isa, threads: usize) -> crate::Result<Plan> {
    compute.check()?;
    let (b, class) = match compute {
        Compute::Int8 { group } => {
            let segs = Segments::new(&w.geometry, group.map(|g| g as usize))?;
            let raw = w.geometry.groups <= 1 && group.is_none();
            let b = int8(m, w, &segs, group.is_some(), isa, threads);
            let unit = match b.path {
                Path::Fused => format!("u{}", w.bits),
                _ => "u8".to_owned(),
            };
            (b, format!("{}_s8_{unit}{}", if raw { "i32" } else { "f32" }, if raw { "" } else { "g" }))
        }
        Compute::F32 => (float(m, w, false, isa, threads), "f32_f32_f32".to_owned()),
        Compute::Bf16 => (float(m, w, true, isa, threads), "f32_bf16_bf16".to_owned()),
    };
    let kr = match b.path {
        Path::Tiles => 64,
        Path::TilesBf16 => 32,
        Path::Gemv | Path::Gemm => 1,
        _ => 4,
    };
    let isa_name = match (isa, b.path) {
        (Isa::Amx, Path::Tiles | Path::TilesBf16) => Isa::Amx,
        _ => kernel::table(isa).isa,
    };
    let mr = if matches!(b.path, Path::Tiles | Path::TilesBf16) { 32 } else { b.mr };
    Ok(Plan {
        isa,
        compute,
        path: b.path,
        mr,
        np: b.np,
        task_panels: b.task_panels,
        task_rows: b.task_rows,
        window: b.window,
        threads: b.threads.min(b.tasks.max(1)),
        tasks: b.tasks,
        shape: (m, w.n, w.geometry.k),
        weight_bytes: w.nbytes(),
        padded_k: w.geometry.kp,
        kernel: format!("{class}_{mr}x{}k{kr}_{isa_name}", b.np * PANEL),
        format: w.format.to_string(),
    })
}

impl Plan {
    /// Operations counted as `2*M*N*K`.
    pub fn operations(&self) -> f64 {
        let (m, n, k) = self.shape;
        2.0 * m as f64 * n as f64 * k as f64
    }

    /// The plan as (name, value) pairs.
    pub fn fields(&self) -> Vec<(&'static str, String)> {
        let (m, n, k) = self.shape;
        vec![
            ("kernel", self.kernel.clone()),
            ("format", self.format.clone()),
            ("compute", self.compute.to_string()),
            ("isa", self.isa.to_string()),
            ("path", format!("{:?}", self.path).to_lowercase()),
            ("m", m.to_string()),
            ("n", n.to_string()),
            ("k", k.to_string()),
            ("padded_k", self.padded_k.to_string()),
            ("task_rows", self.task_rows.to_string()),
            ("task_columns", (self.task_panels * PANEL).to_string()),
            ("window_k", (self.window * 64).to_string()),
            ("tasks", self.tasks.to_string()),
            ("threads", self.threads.to_string()),
            ("weight_bytes", self.weight_bytes.to_string()),
            ("operations", format!("{:.0}", self.operations())),
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
