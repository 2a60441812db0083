//! Vectors as arrays, for every processor; the compiler makes of them what its target has.

use super::super::half::{f16_to_f32, f32_to_f16};
use super::{Kernel, Simd};

const LANES: usize = 8;

/// Eight lanes in an array.
#[derive(Clone, Copy)]
pub(super) struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn map<T: Copy, U: Copy>(given: [T; LANES], zero: U, f: impl Fn(T) -> U) -> [U; LANES] {
    let mut found = [zero; LANES];
    let mut i = 0;
    while i < LANES {
        found[i] = f(given[i]);
        i += 1;
    }
    found
}

#[inline(always)]
fn map2(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    let mut found = [0.0; LANES];
    let mut i = 0;
    while i < LANES {
        found[i] = f(a[i], b[i]);
        i += 1;
    }
    found
}

impl Simd for Portable {
    type V = V;
    const LANES: usize = LANES;
    const COLUMNS: usize = 2;

    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> V {
        // SAFETY: the caller gives LANES valid elements.
        unsafe { from.cast::<V>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: V) {
        // SAFETY: as in `load`.
        unsafe { to.cast::<V>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> V {
        // SAFETY: as in `load`.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        map(bits, 0.0, f16_to_f32)
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> V {
        // SAFETY: as in `load`.
        let values = unsafe { from.cast::<[i8; LANES]>().read_unaligned() };
        map(values, 0.0, f32::from)
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, v: V) {
        // SAFETY: as in `load`.
        unsafe {
            to.cast::<[u16; LANES]>()
                .write_unaligned(map(v, 0, f32_to_f16));
        }
    }

    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        map2(a, b, |x, y| x + y)
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        map2(a, b, |x, y| x - y)
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        map2(a, b, |x, y| x * y)
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        map2(a, b, |x, y| x / y)
    }

    #[inline(always)]
    fn mul_add(self, a: V, b: V, c: V) -> V {
        // Without the instruction, `f32::mul_add` is a slow function call.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            let mut found = c;
            let mut i = 0;
            while i < LANES {
                found[i] = a[i].mul_add(b[i], c[i]);
                i += 1;
            }
            found
        } else {
            map2(map2(a, b, |x, y| x * y), c, |x, y| x + y)
        }
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        map2(a, b, |x, y| if x > y { x } else { y })
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        map2(a, b, |x, y| if x < y { x } else { y })
    }

    #[inline(always)]
    fn round(self, v: V) -> V {
        // Adding and taking away 1.5 * 2^23 leaves the integer, for |v| < 2^22: elsewhere it is a function call.
        const MAGIC: f32 = 12_582_912.0;
        map(v, 0.0, |x| (x + MAGIC) - MAGIC)
    }

    #[inline(always)]
    fn pow2(self, v: V) -> V {
        map(v, 0.0, |x| f32::from_bits(((x as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    #[inline(always)]
    fn max_lane(self, v: V) -> f32 {
        v.into_iter()
            .fold(f32::NEG_INFINITY, |x, y| if x > y { x } else { y })
    }

    #[inline(always)]
    fn at_least(self, a: V, b: V) -> u32 {
        (0..LANES).fold(0, |bits, i| bits | u32::from(a[i] >= b[i]) << i)
    }
}
