//! Buffers for kernels: aligned to cache lines, and shared by a team whose threads use disjoint ranges.

mod mapping;
#[cfg(target_os = "linux")]
mod slab;

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

#[cfg(target_os = "linux")]
use slab::Slab;

pub(in crate::cpu) use mapping::{MAPPING_ALIGNMENT, Mapping};

/// Alignment of buffers, in bytes.
pub(in crate::cpu) const LINE_BYTES: usize = 64;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE_BYTES]);

/// Types for which any bytes are a valid value, and whose alignment is at most a cache line.
///
/// # Safety
/// Every bit pattern must be a valid value, no byte of a value padding, and the type's alignment at most 64.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: numbers have no invalid bit patterns.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for i8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}

/// A fixed number of values, aligned to a cache line. They are zeros at first, or mapped from a file.
pub struct Aligned<T> {
    start: NonNull<u8>,
    len: usize,
    owner: Owner,
    values: PhantomData<T>,
}

/// The owner of a buffer's memory.
enum Owner {
    Lines {
        _lines: Vec<Line>,
    },
    #[cfg(target_os = "linux")]
    Slab {
        _slab: Arc<Slab>,
    },
    /// A read-only mapping of a file. The first write copies the values.
    Mapping {
        map: Arc<Mapping>,
    },
}

// SAFETY: it owns its values, as a vector does.
unsafe impl<T: Plain> Send for Aligned<T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for Aligned<T> {}

impl<T: Plain> Aligned<T> {
    /// `len` zeros.
    ///
    /// # Panics
    /// If they take more bytes than can be counted.
    pub fn zeroed(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>());
        let count = bytes
            .expect("a buffer's size is a usize")
            .div_ceil(LINE_BYTES);
        let mut lines = vec![Line([0; LINE_BYTES]); count];
        Self {
            // The pointer of a vector is never null.
            start: NonNull::new(lines.as_mut_ptr().cast()).unwrap_or(NonNull::dangling()),
            len,
            owner: Owner::Lines { _lines: lines },
            values: PhantomData,
        }
    }

    /// `len` zeros in memory that may use huge pages, for buffers that live as long as a model.
    ///
    /// # Panics
    /// As [`Self::zeroed`].
    pub fn lasting(len: usize) -> Self {
        #[cfg(target_os = "linux")]
        if let Some(bytes) = len.checked_mul(size_of::<T>())
            && let Some((slab, start)) = slab::piece(bytes)
        {
            return Self {
                start,
                len,
                owner: Owner::Slab { _slab: slab },
                values: PhantomData,
            };
        }
        Self::zeroed(len)
    }

    /// `len` values of a mapped file from byte `offset` on, in native byte order. `None` if the file is too short there, or the
    /// offset is not aligned to a cache line.
    pub(in crate::cpu) fn mapped(map: &Arc<Mapping>, offset: usize, len: usize) -> Option<Self> {
        let end = offset.checked_add(len.checked_mul(size_of::<T>())?)?;
        let start = map.at(&(offset..end))?;
        start.addr().get().is_multiple_of(LINE_BYTES).then(|| Self {
            start,
            len,
            owner: Owner::Mapping {
                map: Arc::clone(map),
            },
            values: PhantomData,
        })
    }

    /// The bytes of all values.
    pub(in crate::cpu) fn bytes(&self) -> &[u8] {
        // SAFETY: the values lie side by side, and those of a `Plain` type are bytes without padding.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), size_of_val(&**self)) }
    }

    /// Replaces the buffer by `len` zeros if it is shorter.
    pub(in crate::cpu) fn grow(&mut self, len: usize) {
        if self.len() < len {
            *self = Self::zeroed(len);
        }
    }

    /// A copy of `values`.
    pub fn from_slice(values: &[T]) -> Self {
        let mut copy = Self::zeroed(values.len());
        copy.copy_from_slice(values);
        copy
    }
}

impl<T: Plain> Clone for Aligned<T> {
    fn clone(&self) -> Self {
        match self.owner {
            Owner::Lines { .. } => Self::from_slice(self),
            #[cfg(target_os = "linux")]
            Owner::Slab { .. } => {
                let mut copy = Self::lasting(self.len);
                copy.copy_from_slice(self);
                copy
            }
            Owner::Mapping { ref map } => Self {
                start: self.start,
                len: self.len,
                owner: Owner::Mapping {
                    map: Arc::clone(map),
                },
                values: PhantomData,
            },
        }
    }
}

impl<T: Plain> Default for Aligned<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T: Plain> std::ops::Deref for Aligned<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: the memory holds at least `len` values, aligned, and any bytes are a value of a `Plain` type.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> std::ops::DerefMut for Aligned<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        if matches!(self.owner, Owner::Mapping { .. }) {
            let mut own = Self::lasting(self.len);
            own.copy_from_slice(self);
            *self = own;
        }
        // SAFETY: as in `deref`, and the memory is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len) }
    }
}

/// A slice that the threads of a team read and write. Between two barriers, each thread uses ranges of its own.
pub struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it is only a place; whoever reads or writes it promises that no other thread is in the way.
unsafe impl<T: Send + Sync> Send for SharedSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for SharedSlice<'_, T> {}

impl<T> Clone for SharedSlice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    /// Shares `slice` while it is borrowed.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            slice: PhantomData,
        }
    }

    /// Shares `slice` for reading only.
    pub fn read_only(slice: &'a [T]) -> Self {
        Self {
            start: slice.as_ptr().cast_mut(),
            len: slice.len(),
            slice: PhantomData,
        }
    }

    /// Shares `len` values from `start` on.
    ///
    /// # Safety
    /// They must stay allocated and initialized for `'a`, and be touched in this time only through copies of this value.
    pub const unsafe fn from_raw(start: *mut T, len: usize) -> Self {
        Self {
            start,
            len,
            slice: PhantomData,
        }
    }

    /// Number of values.
    #[inline]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no values.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Pointer to the first value.
    #[inline]
    pub const fn as_ptr(&self) -> *mut T {
        self.start
    }

    /// The part in `range`.
    ///
    /// # Panics
    /// If the range does not lie within it.
    #[must_use]
    #[inline]
    pub fn part(&self, range: Range<usize>) -> Self {
        self.check(&range);
        Self {
            // SAFETY: the range lies within the slice.
            start: unsafe { self.start.add(range.start) },
            len: range.len(),
            slice: PhantomData,
        }
    }

    /// Reads the values in `range`.
    ///
    /// # Safety
    /// No thread may write them while the result is in use.
    ///
    /// # Panics
    /// If the range does not lie within it.
    #[inline]
    pub unsafe fn get(&self, range: Range<usize>) -> &'a [T] {
        self.check(&range);
        // SAFETY: the range lies within the slice, and the caller keeps writers away.
        unsafe { std::slice::from_raw_parts(self.start.add(range.start), range.len()) }
    }

    /// Writes the values in `range`.
    ///
    /// # Safety
    /// It must not be made by [`SharedSlice::read_only`], and nothing else may read or write the range while the result is in use.
    ///
    /// # Panics
    /// If the range does not lie within it.
    #[inline]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn get_mut(&self, range: Range<usize>) -> &'a mut [T] {
        self.check(&range);
        // SAFETY: the range lies within the slice, and the caller keeps everyone else away.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    fn check(&self, range: &Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "the range {range:?} does not lie within the {} values",
            self.len
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_buffers_begin_at_a_cache_line_and_hold_zeros() {
        for len in [0, 1, 15, 16, 17, 1000] {
            let mut buffer = Aligned::<f32>::zeroed(len);
            assert_eq!(buffer.as_ptr() as usize % LINE_BYTES, 0);
            assert_eq!(*buffer, vec![0.0; len]);
            buffer.fill(1.5);
            assert_eq!(*Aligned::from_slice(&buffer), vec![1.5; len]);
            assert_eq!(*buffer.clone(), vec![1.5; len]);
        }
    }

    #[test]
    fn lasting_buffers_are_apart_hold_zeros_and_may_be_large() {
        let lens = [1, 1000, (70 << 20) / 4, 0, 64];
        let mut buffers: Vec<_> = lens
            .iter()
            .map(|&len| Aligned::<f32>::lasting(len))
            .collect();
        for (i, buffer) in buffers.iter_mut().enumerate() {
            assert_eq!(buffer.as_ptr() as usize % LINE_BYTES, 0);
            assert!(buffer.iter().all(|&value| value.to_bits() == 0));
            buffer.fill(i as f32);
        }
        buffers.swap_remove(1);
        let copies = buffers.clone();
        drop(buffers);
        for (buffer, (i, len)) in copies.iter().zip([(0, 1), (4, 64), (2, lens[2]), (3, 0)]) {
            assert_eq!(buffer.len(), len);
            assert!(
                buffer
                    .iter()
                    .all(|&value| value.to_bits() == f32::to_bits(i as f32))
            );
        }
    }

    #[test]
    #[should_panic(expected = "a buffer's size is a usize")]
    fn a_buffer_of_more_bytes_than_can_be_counted_is_refused() {
        let _ = Aligned::<f32>::zeroed(usize::MAX / 2);
    }

    #[test]
    #[should_panic(expected = "does not lie within the 4 values")]
    fn a_range_outside_is_refused() {
        let mut values = [0u8; 4];
        let shared = SharedSlice::new(&mut values);
        let _ = shared.part(2..5);
    }
}
