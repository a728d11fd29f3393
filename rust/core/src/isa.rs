//! Instruction-set levels: what the CPU has, what the user allows, what is used.
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// Levels in ascending order. Each checks its own features: a CPU may lack one in the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust; the specification of every kernel.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX2 with the VEX form of `VPDPBUSD`.
    AvxVnni,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with `VPDPBUSD`.
    Avx512Vnni,
    /// AMX tiles with int8 and bf16 products, beside AVX-512 VNNI.
    Amx,
}

impl Isa {
    /// All levels, lowest first.
    pub const ALL: [Self; 6] = [Self::Scalar, Self::Avx2, Self::AvxVnni, Self::Avx512, Self::Avx512Vnni, Self::Amx];

    /// Lower-case name, as in `NIBBLAS_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Amx => "amx",
        }
    }

    /// Why this CPU or system cannot run the level, or `None` when it can.
    pub fn missing(self) -> Option<&'static str> {
        match self {
            Self::Scalar => None,
            #[cfg(target_arch = "x86_64")]
            _ => x86::missing(self),
            #[cfg(not(target_arch = "x86_64"))]
            _ => Some("not an x86-64 CPU"),
        }
    }

    /// Whether the level runs here.
    pub fn is_available(self) -> bool {
        self.missing().is_none()
    }

    /// The highest available level that is not above `self`.
    #[must_use]
    pub fn clamp_to_cpu(self) -> Self {
        Self::ALL.into_iter().rev().find(|&i| i <= self && i.is_available()).unwrap_or(Self::Scalar)
    }
}

/// Whether the CPU fetches what a product of few rows reads from memory faster without being asked. On a Zen 4 prefetching makes
/// `int4_g128` with one row and cold weights take 1.5 times as long, bytes with up to four rows 1.4 to 1.6 times (measured; two
/// rows and more of fewer bits are as fast or faster with it); the Xeons need it.
#[cfg(target_arch = "x86_64")]
pub(crate) fn streams_by_itself() -> bool {
    use std::sync::OnceLock;
    static AMD: OnceLock<bool> = OnceLock::new();
    *AMD.get_or_init(|| {
        let id = std::arch::x86_64::__cpuid(0);
        [id.ebx, id.edx, id.ecx] == [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes)
    })
}

/// See above: nothing is known of other CPUs.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn streams_by_itself() -> bool {
    false
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|i| i.name() == s.trim().to_ascii_lowercase()).ok_or_else(|| {
            format!("unknown ISA level {s:?}: expected one of scalar, avx2, avxvnni, avx512, avx512vnni, amx")
        })
    }
}

/// The highest level of this CPU.
pub fn detected() -> Isa {
    static D: OnceLock<Isa> = OnceLock::new();
    *D.get_or_init(|| Isa::Amx.clamp_to_cpu())
}

/// The level in use: `NIBBLAS_ISA` where it is set and lower than the CPU's, else [`detected`].
/// Read once per process.
pub fn active() -> Isa {
    request().0
}

/// What to tell the user when `NIBBLAS_ISA` could not be honoured as written.
pub fn warning() -> Option<&'static str> {
    request().1.as_deref()
}

fn request() -> &'static (Isa, Option<String>) {
    static A: OnceLock<(Isa, Option<String>)> = OnceLock::new();
    A.get_or_init(|| {
        let top = detected();
        match std::env::var("NIBBLAS_ISA") {
            Err(_) => (top, None),
            Ok(s) if s.trim().is_empty() => (top, None),
            Ok(s) => match s.parse::<Isa>() {
                Err(e) => (top, Some(format!("NIBBLAS_ISA ignored: {e}"))),
                Ok(want) => {
                    let got = want.clamp_to_cpu();
                    let note = (got != want).then(|| {
                        let why = want.missing().unwrap_or("not available");
                        format!("NIBBLAS_ISA={want} is not available here ({why}); using {got}")
                    });
                    (got, note)
                }
            },
        }
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Isa;
    use std::sync::OnceLock;

    pub fn missing(isa: Isa) -> Option<&'static str> {
        match isa {
            Isa::Scalar => None,
            Isa::Avx2 => avx2(),
            Isa::AvxVnni => {
                avx2().or(if std::is_x86_feature_detected!("avxvnni") { None } else { Some("the CPU lacks AVX-VNNI") })
            }
            Isa::Avx512 => avx512(),
            Isa::Avx512Vnni => avx512vnni(),
            Isa::Amx => {
                static AMX: OnceLock<Option<&'static str>> = OnceLock::new();
                *AMX.get_or_init(|| avx512vnni().or_else(amx))
            }
        }
    }

    fn avx2() -> Option<&'static str> {
        let ok = std::is_x86_feature_detected!("avx2")
            && std::is_x86_feature_detected!("fma")
            && std::is_x86_feature_detected!("f16c");
        (!ok).then_some("the CPU lacks AVX2, FMA or F16C")
    }

    fn avx512() -> Option<&'static str> {
        let ok = avx2().is_none()
            && std::is_x86_feature_detected!("avx512f")
            && std::is_x86_feature_detected!("avx512bw")
            && std::is_x86_feature_detected!("avx512dq")
            && std::is_x86_feature_detected!("avx512vl");
        (!ok).then_some("the CPU lacks AVX-512 F, BW, DQ or VL")
    }

    fn avx512vnni() -> Option<&'static str> {
        avx512().or(if std::is_x86_feature_detected!("avx512vnni") { None } else { Some("the CPU lacks AVX-512 VNNI") })
    }

    /// The three checks, in order; the kernel is asked only when the first two pass, once per process.
    #[allow(unused_unsafe)]
    fn amx() -> Option<&'static str> {
        use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
        // SAFETY: CPUID exists on every x86-64 CPU.
        let edx = unsafe {
            if __cpuid(0).eax < 7 {
                return Some("the CPU lacks AMX");
            }
            __cpuid_count(7, 0).edx
        };
        let need = (1 << 22) | (1 << 24) | (1 << 25);
        // No CPU has tiles without AVX-512 FP16 and VBMI; their kernels take all of it as given.
        let fp16 = edx & 1 << 23 != 0;
        let vector = std::is_x86_feature_detected!("avx512bf16")
            && std::is_x86_feature_detected!("avx512vbmi")
            && std::is_x86_feature_detected!("avx512vbmi2");
        #[cfg(feature = "emulated-tiles")]
        if edx & need == 0 && vector && crate::kernel::x86::emulate::install() {
            return None;
        }
        if edx & need != need || !fp16 || !vector {
            return Some("the CPU lacks AMX (tile, int8 or bf16) or AVX-512 BF16, FP16, VBMI or VBMI2");
        }
        // SAFETY: AVX2 was detected, so XSAVE is on and XGETBV may run.
        if unsafe { xcr0(_xgetbv) } & 0x6_0000 != 0x6_0000 {
            return Some("the operating system did not enable AMX tile state");
        }
        request_permission()
    }

    #[target_feature(enable = "xsave")]
    unsafe fn xcr0(read: unsafe fn(u32) -> u64) -> u64 {
        // SAFETY: the caller checked that XSAVE is on.
        unsafe { read(0) }
    }

    #[cfg(target_os = "linux")]
    fn request_permission() -> Option<&'static str> {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: this call takes no pointers; it only grants this process the tile state.
        let rc = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
        (rc != 0).then_some(
            "the kernel refused AMX permission (too old, or an alternate signal stack is smaller than AT_MINSIGSTKSZ)",
        )
    }

    #[cfg(not(target_os = "linux"))]
    fn request_permission() -> Option<&'static str> {
        Some("AMX permission is only implemented for Linux")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_order() {
        for i in Isa::ALL {
            assert_eq!(i.name().parse::<Isa>().unwrap(), i);
        }
        assert!("sse9".parse::<Isa>().is_err());
        assert!(Isa::Avx512Vnni < Isa::Amx && Isa::Scalar < Isa::Avx2);
    }

    #[test]
    fn clamping_never_rises() {
        for i in Isa::ALL {
            let c = i.clamp_to_cpu();
            assert!(c <= i && c.is_available());
        }
    }
}
