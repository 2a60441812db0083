//! The paged KV cache. Its page is 16 tokens, whatever multiple of that a block of the scheduler has.
//!
//! Within a page each key-value head has one stretch of memory: with i8 the scales (16 of K, 16 of V), then K transposed
//! `[head_dim][16]`, so that a vector holds the same element of 16 keys, then V `[16][width]`, whose rows are padded to whole
//! vectors.

use super::super::memory::SharedSlice;
use super::super::simd::Simd;

/// Number of tokens of a page.
pub const PAGE: usize = 16;

const LINE_BYTES: usize = 64;
const SCALES_BYTES: usize = 2 * PAGE * size_of::<f32>();
const MAX_HALF: f32 = 65504.0;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    /// As they are computed.
    F32,
    /// Half precision. Larger values are clamped.
    F16,
    /// Integers, with one scale for each head's key and each head's value.
    I8,
}

impl KvType {
    #[inline]
    const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
            Self::I8 => 1,
        }
    }
}

/// A stored number that can be converted to f32.
pub(super) trait Element: Copy {
    /// Converts one vector of them.
    ///
    /// # Safety
    /// A vector of elements from `from` on must be valid.
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(from) }
    }
}

/// The bits of a half-precision number.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Half(u16);

impl Element for Half {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16(from.cast()) }
    }
}

impl Element for i8 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_i8(from) }
    }
}

/// Sizes of one head's stretch of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// How the numbers are stored.
    pub dtype: KvType,
    /// Number of key-value heads of a layer.
    pub kv_heads: usize,
    /// Number of elements of a head.
    pub head_dim: usize,
}

impl KvShape {
    /// Number of elements of a stored row of V: `head_dim`, padded to whole vectors.
    #[inline]
    pub(super) const fn width(self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    #[inline]
    const fn scales_bytes(self) -> usize {
        match self.dtype {
            KvType::I8 => SCALES_BYTES,
            KvType::F32 | KvType::F16 => 0,
        }
    }

    #[inline]
    const fn value_offset(self) -> usize {
        self.scales_bytes() + self.head_dim * PAGE * self.dtype.bytes()
    }

    #[inline]
    const fn head_bytes(self) -> usize {
        (self.value_offset() + self.width() * PAGE * self.dtype.bytes())
            .next_multiple_of(LINE_BYTES)
    }

    /// Bytes of one layer's page.
    #[inline]
    pub const fn page_bytes(self) -> usize {
        self.kv_heads * self.head_bytes()
    }
}

/// One head's stretch of a page.
#[derive(Clone, Copy)]
pub(super) struct HeadPage {
    start: *mut u8,
    shape: KvShape,
}

impl HeadPage {
    /// K, `[head_dim][PAGE]`.
    #[inline]
    pub(super) const fn keys<E>(self) -> *const E {
        // SAFETY: the offset lies within the stretch.
        unsafe { self.start.add(self.shape.scales_bytes()) }
            .cast_const()
            .cast()
    }

    /// V, `[PAGE][width]`.
    #[inline]
    pub(super) const fn values<E>(self) -> *const E {
        // SAFETY: as in `keys`.
        unsafe { self.start.add(self.shape.value_offset()) }
            .cast_const()
            .cast()
    }

    /// With i8: the factors of the page's 16 keys.
    #[inline]
    pub(super) const fn key_scales(self) -> *const f32 {
        self.start.cast_const().cast()
    }

    /// With i8: the factors of the page's 16 values.
    #[inline]
    pub(super) const fn value_scales(self) -> *const f32 {
        // SAFETY: as in `keys`.
        unsafe { self.key_scales().add(PAGE) }
    }
}

/// The memory of a layer's keys and values.
#[derive(Debug, Clone, Copy)]
struct CachedLayer {
    shape: KvShape,
    /// The offset of its first page.
    start: usize,
    pages: usize,
}

/// The keys and values of all layers. Each layer has its own shape.
pub struct KvCache {
    layers: Vec<CachedLayer>,
    pages: usize,
    window_pages: usize,
    /// Large enough to start at a cache line.
    memory: Vec<u8>,
}

impl KvCache {
    /// A cache of `pages` pages in each layer. Memory takes no RAM until it is written.
    pub fn new(shapes: &[KvShape], pages: usize) -> Self {
        Self::with_windows(shapes, &vec![false; shapes.len()], (pages, pages))
    }

    /// A cache of `pages` pages in each layer, and another number in those that are `windowed`.
    pub fn with_windows(
        shapes: &[KvShape],
        windowed: &[bool],
        (pages, window_pages): (usize, usize),
    ) -> Self {
        let mut bytes = 0;
        let mut layers = Vec::with_capacity(shapes.len());
        for (&shape, &windowed) in shapes.iter().zip(windowed) {
            let pages = if windowed { window_pages } else { pages };
            layers.push(CachedLayer {
                shape,
                start: bytes,
                pages,
            });
            bytes += pages * shape.page_bytes();
        }
        Self {
            layers,
            pages,
            window_pages,
            memory: vec![0; bytes + LINE_BYTES],
        }
    }

    /// Number of pages of a layer.
    pub const fn pages(&self) -> usize {
        self.pages
    }

    /// Number of pages of a layer with a sliding window.
    pub const fn window_pages(&self) -> usize {
        self.window_pages
    }

    /// Copies `count` pages, starting with page `from`, to the pages from `to` on, in every layer.
    ///
    /// # Panics
    /// If there are no such pages.
    pub fn copy_pages(&mut self, from: usize, to: usize, count: usize) {
        let skipped = self.memory.as_ptr().align_offset(LINE_BYTES);
        for layer in &self.layers {
            assert!(from.max(to) + count <= layer.pages);
            let at = |page: usize| skipped + layer.start + page * layer.shape.page_bytes();
            self.memory.copy_within(at(from)..at(from + count), at(to));
        }
    }

    /// Bytes of a page of all layers.
    pub fn page_bytes(&self) -> usize {
        self.layers
            .iter()
            .map(|layer| layer.shape.page_bytes())
            .sum()
    }

    /// Appends the bytes of `count` pages from page `from` on, layer after layer.
    ///
    /// # Panics
    /// If there are no such pages in some layer.
    pub fn read_pages(&self, from: usize, count: usize, bytes: &mut Vec<u8>) {
        let skipped = self.memory.as_ptr().align_offset(LINE_BYTES);
        for layer in &self.layers {
            assert!(from + count <= layer.pages);
            let at = |page: usize| skipped + layer.start + page * layer.shape.page_bytes();
            bytes.extend_from_slice(&self.memory[at(from)..at(from + count)]);
        }
    }

    /// Writes the bytes of [`Self::read_pages`] to the same number of pages from page `to` on.
    ///
    /// # Panics
    /// If there are no such pages in some layer, or the bytes are not of `count` pages.
    pub fn write_pages(&mut self, to: usize, count: usize, mut bytes: &[u8]) {
        assert_eq!(bytes.len(), count * self.page_bytes());
        let skipped = self.memory.as_ptr().align_offset(LINE_BYTES);
        for layer in &self.layers {
            assert!(to + count <= layer.pages);
            let at = |page: usize| skipped + layer.start + page * layer.shape.page_bytes();
            let (own, rest) = bytes.split_at(count * layer.shape.page_bytes());
            self.memory[at(to)..at(to + count)].copy_from_slice(own);
            bytes = rest;
        }
    }

    /// The cache as a team's threads read and write it.
    pub fn view(&mut self) -> CacheView<'_> {
        let skipped = self.memory.as_ptr().align_offset(LINE_BYTES);
        CacheView {
            layers: &self.layers,
            memory: SharedSlice::new(&mut self.memory[skipped..]),
        }
    }
}

/// A [`KvCache`] shared by a team. Its threads write different tokens, and do not read tokens that are being written.
#[derive(Clone, Copy)]
pub struct CacheView<'a> {
    layers: &'a [CachedLayer],
    memory: SharedSlice<'a, u8>,
}

impl<'a> CacheView<'a> {
    /// One layer of it.
    ///
    /// # Panics
    /// If there is no such layer.
    #[inline]
    pub fn layer(&self, layer: usize) -> KvView<'a> {
        let CachedLayer {
            shape,
            start,
            pages,
        } = self.layers[layer];
        KvView {
            shape,
            pages,
            memory: self.memory.part(start..start + pages * shape.page_bytes()),
        }
    }
}

/// One layer of a [`CacheView`].
#[derive(Clone, Copy)]
pub struct KvView<'a> {
    shape: KvShape,
    pages: usize,
    memory: SharedSlice<'a, u8>,
}

impl KvView<'_> {
    /// Its shape.
    #[inline]
    pub const fn shape(&self) -> KvShape {
        self.shape
    }

    /// # Panics
    /// If there is no such page or head.
    #[inline]
    pub(super) fn head(&self, page: usize, head: usize) -> HeadPage {
        let shape = self.shape;
        assert!(page < self.pages && head < shape.kv_heads);
        let at = page * shape.page_bytes() + head * shape.head_bytes();
        HeadPage {
            // SAFETY: the stretch lies within the memory, as was checked.
            start: unsafe { self.memory.as_ptr().add(at) },
            shape,
        }
    }

    /// Prefetches what [`Self::write`] will write for the token at `slot`: each line or two of its page contains an element of the
    /// key.
    #[inline(always)]
    pub(in super::super) fn prefetch<S: Simd>(&self, s: S, slot: usize) {
        let bytes = self.shape.dtype.bytes();
        for head in 0..self.shape.kv_heads {
            let page = self.head(slot / PAGE, head);
            let values = page.values::<u8>();
            let row = values.wrapping_add(slot % PAGE * self.shape.width() * bytes);
            let mut at = page.start.cast_const();
            while at < values {
                s.prefetch(at);
                at = at.wrapping_add(LINE_BYTES);
            }
            for line in 0..(self.shape.width() * bytes).div_ceil(LINE_BYTES) {
                s.prefetch(row.wrapping_add(line * LINE_BYTES));
            }
        }
    }

    /// Stores one head's key and value [`head_dim`] of the token at `slot`.
    ///
    /// # Safety
    /// No other thread may touch this slot meanwhile.
    #[inline(always)]
    pub(in super::super) unsafe fn write<S: Simd>(
        &self,
        s: S,
        slot: usize,
        head: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let page = self.head(slot / PAGE, head);
        let (offset, width) = (slot % PAGE, self.shape.width());
        assert!(key.len() == self.shape.head_dim && value.len() == self.shape.head_dim);
        // SAFETY: the token's elements lie within the stretch, and no one else touches them.
        unsafe {
            match self.shape.dtype {
                KvType::F32 => {
                    let keys = page.keys::<f32>().cast_mut().add(offset);
                    let values = page.values::<f32>().cast_mut().add(offset * width);
                    for (i, (&k, &v)) in key.iter().zip(value).enumerate() {
                        keys.add(i * PAGE).write(k);
                        values.add(i).write(v);
                    }
                }
                KvType::F16 => {
                    let keys = page.keys::<u16>().cast_mut().add(offset);
                    let values = page.values::<u16>().cast_mut().add(offset * width);
                    for start in (0..key.len()).step_by(PAGE) {
                        let end = key.len().min(start + PAGE);
                        for (i, &k) in (start..end).zip(&halves(s, &key[start..end])) {
                            keys.add(i * PAGE).write(k);
                        }
                        for (i, &v) in (start..end).zip(&halves(s, &value[start..end])) {
                            values.add(i).write(v);
                        }
                    }
                }
                KvType::I8 => {
                    let keys = page.keys::<i8>().cast_mut().add(offset);
                    let values = page.values::<i8>().cast_mut().add(offset * width);
                    let (scale, inverse) = scales(key);
                    page.key_scales().cast_mut().add(offset).write(scale);
                    for (i, &k) in key.iter().enumerate() {
                        keys.add(i * PAGE)
                            .write((k * inverse).round_ties_even() as i8);
                    }
                    let (scale, inverse) = scales(value);
                    page.value_scales().cast_mut().add(offset).write(scale);
                    for (i, &v) in value.iter().enumerate() {
                        values.add(i).write((v * inverse).round_ties_even() as i8);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
impl KvView<'_> {
    /// The key and the value that an f32 cache holds at a slot.
    pub(in super::super) fn page_rows(&self, slot: usize, head: usize) -> (Vec<f32>, Vec<f32>) {
        let page = self.head(slot / PAGE, head);
        let (offset, shape) = (slot % PAGE, self.shape);
        assert_eq!(shape.dtype, KvType::F32);
        (0..shape.head_dim)
            // SAFETY: the elements lie within the page.
            .map(|i| unsafe {
                (
                    page.keys::<f32>().add(i * PAGE + offset).read(),
                    page.values::<f32>().add(offset * shape.width() + i).read(),
                )
            })
            .unzip()
    }
}

/// Converts up to [`PAGE`] numbers to half precision.
#[inline(always)]
fn halves<S: Simd>(s: S, given: &[f32]) -> [u16; PAGE] {
    let (mut padded, mut converted) = ([0.0; PAGE], [0; PAGE]);
    padded[..given.len()].copy_from_slice(given);
    for start in (0..PAGE).step_by(S::LANES) {
        // SAFETY: a page holds whole vectors.
        unsafe {
            let v = s.load(padded.as_ptr().add(start));
            let v = s.max(s.splat(-MAX_HALF), s.min(s.splat(MAX_HALF), v));
            s.store_f16(converted.as_mut_ptr().add(start), v);
        }
    }
    converted
}

/// The scale that maps the largest number to 127, and its inverse. NaN if a number is not finite.
#[inline(always)]
fn scales(given: &[f32]) -> (f32, f32) {
    let largest = given.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    if given.iter().any(|x| !x.is_finite()) {
        (f32::NAN, 0.0)
    } else if largest == 0.0 {
        (0.0, 0.0)
    } else {
        (largest / 127.0, 127.0 / largest)
    }
}
