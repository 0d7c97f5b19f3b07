//! Which instruction set runs.

use std::sync::OnceLock;

use crate::error::{Error, Result};

/// An instruction set with kernels of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 with tiles of bfloat16, which screen what f32 then decides: the same bits, sooner still.
    Amx,
    /// AVX-512 with products of bfloat16, which screen what f32 then decides: the same bits, sooner.
    Avx512Bf16,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// aarch64.
    Neon,
    /// Plain Rust, for any processor.
    Portable,
}

impl Isa {
    /// Its name in `NEST_RS_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Amx => "amx",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        }
    }

    /// True if it has AVX-512.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn has_avx512(self) -> bool {
        matches!(self, Isa::Amx | Isa::Avx512Bf16 | Isa::Avx512)
    }

    /// True if it multiplies bfloat16.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn has_bfloat16(self) -> bool {
        matches!(self, Isa::Amx | Isa::Avx512Bf16)
    }

    /// True if this processor has it for no gain: Intel's multiply bfloat16 in vectors no faster than f32, and
    /// screening costs more than that (measured on one: 5.8 s against 4.1 s).
    fn is_slow(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            const GENU: u32 = u32::from_le_bytes(*b"Genu");
            self == Isa::Avx512Bf16 && cpuid(0).ebx == GENU
        }
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// True if this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => super::amx::is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Isa::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                // The wide loops of `vector` use the narrower sets as well.
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            Isa::Portable => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }
}

/// What the processor says of itself.
#[cfg(target_arch = "x86_64")]
pub(super) fn cpuid(leaf: u32) -> core::arch::x86_64::CpuidResult {
    // SAFETY: every x86-64 processor has the instruction. Newer compilers know that.
    #[allow(unused_unsafe)]
    unsafe {
        core::arch::x86_64::__cpuid_count(leaf, 0)
    }
}

const ALL: [Isa; 6] = [
    Isa::Amx,
    Isa::Avx512Bf16,
    Isa::Avx512,
    Isa::Avx2,
    Isa::Neon,
    Isa::Portable,
];

fn choose() -> std::result::Result<Isa, String> {
    let best = || {
        ALL.into_iter()
            .find(|isa| isa.is_available() && !isa.is_slow())
    };
    let pinned = match std::env::var("NEST_RS_ISA") {
        Ok(name) if !name.is_empty() => name,
        _ => return Ok(best().unwrap_or(Isa::Portable)),
    };
    ALL.into_iter()
        .find(|isa| isa.name() == pinned && isa.is_available())
        .ok_or(pinned)
}

static CHOSEN: OnceLock<std::result::Result<Isa, String>> = OnceLock::new();

/// The instruction set in use: the fastest of this processor, or the one that the environment
/// variable `NEST_RS_ISA` (`amx`, `avx512bf16`, `avx512`,
/// `avx2`, `neon`, `portable`) named at first use.
pub fn active_isa() -> Isa {
    *CHOSEN
        .get_or_init(choose)
        .as_ref()
        .unwrap_or(&Isa::Portable)
}

/// Fails if `NEST_RS_ISA` asks for what is not there.
pub(crate) fn check_isa() -> Result<()> {
    match CHOSEN.get_or_init(choose) {
        Ok(_) => Ok(()),
        Err(pinned) => {
            let here: Vec<_> = ALL
                .into_iter()
                .filter(|isa| isa.is_available())
                .map(Isa::name)
                .collect();
            Err(Error::argument(
                "NEST_RS_ISA",
                pinned,
                format!("this processor has {}", here.join(", ")),
            ))
        }
    }
}
