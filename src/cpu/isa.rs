//! The instruction sets that kernels may use, detected once.

use crate::error::{Error, Result};

/// An instruction set that kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Available everywhere.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// AVX2 with 256-bit VNNI (AVX-VNNI).
    Avx2Vnni,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// aarch64 with NEON and its dot products.
    NeonDot,
}

impl Isa {
    /// All that this processor supports, the fastest last.
    pub fn available() -> Vec<Self> {
        [
            Self::Portable,
            Self::Avx2,
            Self::Avx2Vnni,
            Self::Avx512,
            Self::NeonDot,
        ]
        .into_iter()
        .filter(|isa| isa.runs_here())
        .collect()
    }

    /// The fastest that this processor supports.
    pub fn detect() -> Self {
        Self::available().pop().unwrap_or(Self::Portable)
    }

    /// The instruction set with this name. Without a name, the fastest one.
    ///
    /// # Errors
    /// `invalid_value` for one that this processor does not support.
    pub fn choose(name: Option<&str>) -> Result<Self> {
        let Some(name) = name else {
            return Ok(Self::detect());
        };
        let available = Self::available();
        let named = available.iter().find(|isa| isa.name() == name);
        named.copied().ok_or_else(|| {
            let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
            let names = names.join(", ");
            Error::invalid(
                "isa",
                format!(
                    "LMSERVE_CPU_ISA is one of {names} on this processor, but {name} was given"
                ),
            )
        })
    }

    /// Its name, such as `avx512`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx2Vnni => "avx2-vnni",
            Self::Avx512 => "avx512",
            Self::NeonDot => "neon-dotprod",
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn runs_here(self) -> bool {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        match self {
            Self::Portable => true,
            Self::Avx2 => avx2,
            Self::Avx2Vnni => avx2 && is_x86_feature_detected!("avxvnni"),
            Self::Avx512 => {
                avx2 && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            Self::NeonDot => false,
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn runs_here(self) -> bool {
        match self {
            Self::Portable => true,
            Self::NeonDot => std::arch::is_aarch64_feature_detected!("dotprod"),
            Self::Avx2 | Self::Avx2Vnni | Self::Avx512 => false,
        }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn runs_here(self) -> bool {
        self == Self::Portable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_has_the_portable_set_and_detection_takes_the_last() {
        let available = Isa::available();
        assert_eq!(available.first(), Some(&Isa::Portable));
        assert_eq!(available.last(), Some(&Isa::detect()));
    }

    #[test]
    fn a_set_is_chosen_by_its_name_if_it_is_there() {
        assert_eq!(Isa::choose(None).unwrap(), Isa::detect());
        for isa in Isa::available() {
            assert_eq!(Isa::choose(Some(isa.name())).unwrap(), isa);
        }
        let error = Isa::choose(Some("sse9")).unwrap_err();
        assert!(error.message.contains("portable"), "{error}");
        assert!(error.message.ends_with("but sse9 was given"), "{error}");
    }
}
