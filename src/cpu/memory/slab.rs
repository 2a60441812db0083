//! Memory for weights, which stay: large ranges of address space that the system may fill with huge pages, cut into pieces.
//!
//! A step of one token mostly reads weights in order, which is faster with pages of 2 MB than with pages of 4 kB.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::LINE_BYTES;

/// Size of a range, unless a piece needs more. Pages that were never written take no memory.
const SLAB_BYTES: usize = 64 << 20;
const HUGE_PAGE: usize = 2 << 20;

/// One range, given back when the last of its pieces is dropped.
pub(super) struct Slab {
    map: *mut libc::c_void,
    map_bytes: usize,
}

// SAFETY: it is only a place; its pieces are disjoint.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

/// The range that pieces are cut from at present, where its free part begins, and how much that is.
struct Current {
    slab: Weak<Slab>,
    free: usize,
    left: usize,
}

static CURRENT: Mutex<Current> = Mutex::new(Current {
    slab: Weak::new(),
    free: 0,
    left: 0,
});

/// A piece of `bytes` zeros at a cache line, with what keeps it; `None` where the system has no such memory.
pub(super) fn piece(bytes: usize) -> Option<(Arc<Slab>, NonNull<u8>)> {
    if cfg!(miri) {
        // It knows no madvise.
        return None;
    }
    let bytes = bytes.next_multiple_of(LINE_BYTES);
    let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
    let slab = match current.slab.upgrade() {
        Some(slab) if bytes <= current.left => slab,
        _ => {
            let (slab, start, len) = Slab::map(bytes.max(SLAB_BYTES))?;
            let slab = Arc::new(slab);
            *current = Current {
                slab: Arc::downgrade(&slab),
                free: start,
                left: len,
            };
            slab
        }
    };
    let piece = NonNull::new(std::ptr::with_exposed_provenance_mut(current.free))?;
    current.free += bytes;
    current.left -= bytes;
    Some((slab, piece))
}

impl Slab {
    /// Maps at least `bytes` bytes, and says where those that huge pages may fill begin and how many they are.
    fn map(bytes: usize) -> Option<(Self, usize, usize)> {
        let len = bytes.next_multiple_of(HUGE_PAGE);
        let map_bytes = len + HUGE_PAGE;
        // SAFETY: a new private mapping touches no memory of others.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return None;
        }
        let start = map.expose_provenance().next_multiple_of(HUGE_PAGE);
        // A refusal leaves small pages, which do as well.
        // SAFETY: the range lies within the mapping.
        unsafe {
            libc::madvise(
                std::ptr::with_exposed_provenance_mut(start),
                len,
                libc::MADV_HUGEPAGE,
            );
        }
        Some((Self { map, map_bytes }, start, len))
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's, and no piece of it is left.
        unsafe { libc::munmap(self.map, self.map_bytes) };
    }
}
