//! Vectors of which only some lanes are used, at the end of a row.

use super::super::simd::Simd;

/// The first `n` of a vector's numbers from `from` on, and zeros.
///
/// # Safety
/// They must be valid.
#[inline(always)]
pub(super) unsafe fn load_lanes<S: Simd>(s: S, from: *const f32, n: usize) -> S::V {
    // SAFETY: the caller's promise, and a copy has room for a vector.
    unsafe {
        if n == S::LANES {
            return s.load(from);
        }
        let mut lanes = [0.0_f32; 16];
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n);
        s.load(lanes.as_ptr())
    }
}

/// Writes the first `n` numbers of a vector.
///
/// # Safety
/// Their place must be valid, and this thread's.
#[inline(always)]
pub(super) unsafe fn store_lanes<S: Simd>(s: S, to: *mut f32, v: S::V, n: usize) {
    // SAFETY: as in `load_lanes`.
    unsafe {
        if n == S::LANES {
            s.store(to, v);
            return;
        }
        let mut lanes = [0.0_f32; 16];
        s.store(lanes.as_mut_ptr(), v);
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
    }
}
