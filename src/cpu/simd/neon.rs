//! Four lanes of NEON, which every aarch64 processor has.

#[allow(clippy::wildcard_imports, reason = "nearly every line is one of them")]
use std::arch::aarch64::*;
use std::arch::asm;

use super::{Kernel, Simd};

/// NEON belongs to the target.
#[derive(Clone, Copy)]
pub(super) struct Neon;

// SAFETY of every block below: the target has the instructions; pointers are the caller's promise.
impl Simd for Neon {
    type V = float32x4_t;
    const LANES: usize = 4;
    const COLUMNS: usize = 4;

    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon")]
        unsafe fn enabled<K: Kernel>(s: Neon, kernel: K) -> K::Output {
            kernel.run(s)
        }
        unsafe { enabled(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(x) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> float32x4_t {
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: float32x4_t) {
        unsafe { vst1q_f32(to, v) }
    }

    // The intrinsics of half precision are not stable.
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> float32x4_t {
        let widened: float32x4_t;
        unsafe {
            let halves = vld1_u16(from);
            asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) widened, in(vreg) halves, options(pure, nomem, nostack));
        }
        widened
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> float32x4_t {
        unsafe {
            let bytes = vreinterpret_s8_s32(vdup_n_s32(from.cast::<i32>().read_unaligned()));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, v: float32x4_t) {
        unsafe {
            let halves: uint16x4_t;
            asm!("fcvtn {0:v}.4h, {1:v}.4s", out(vreg) halves, in(vreg) v, options(pure, nomem, nostack));
            vst1_u16(to, halves);
        }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        unsafe {
            asm!("prfm pldl1keep, [{0}]", in(reg) at, options(nostack, readonly, preserves_flags));
        }
    }

    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vsubq_f32(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vdivq_f32(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }

    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
    }

    #[inline(always)]
    fn round(self, v: float32x4_t) -> float32x4_t {
        unsafe { vrndnq_f32(v) }
    }

    #[inline(always)]
    fn pow2(self, v: float32x4_t) -> float32x4_t {
        unsafe {
            let exponent = vaddq_s32(vcvtnq_s32_f32(v), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
        }
    }

    #[inline(always)]
    fn sum(self, v: float32x4_t) -> f32 {
        unsafe { vaddvq_f32(v) }
    }

    #[inline(always)]
    fn max_lane(self, v: float32x4_t) -> f32 {
        unsafe { vmaxvq_f32(v) }
    }

    #[inline(always)]
    fn at_least(self, a: float32x4_t, b: float32x4_t) -> u32 {
        unsafe {
            let bits = vld1q_u32([1, 2, 4, 8].as_ptr());
            vaddvq_u32(vandq_u32(vcgeq_f32(a, b), bits))
        }
    }
}
