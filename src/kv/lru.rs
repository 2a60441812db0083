//! A list of block ids in order of last use, with O(1) removal from the middle.

const NONE: u32 = u32::MAX;

/// Doubly linked list threaded through two arrays indexed by block id.
#[derive(Debug)]
pub(super) struct LruList {
    prev: Vec<u32>,
    next: Vec<u32>,
    head: u32,
    tail: u32,
    len: usize,
}

impl LruList {
    pub(super) fn new(num_blocks: usize) -> Self {
        Self {
            prev: vec![NONE; num_blocks],
            next: vec![NONE; num_blocks],
            head: NONE,
            tail: NONE,
            len: 0,
        }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Makes `block` the most recently used. It must not be in the list.
    pub(super) fn push_back(&mut self, block: u32) {
        let at = block as usize;
        self.prev[at] = self.tail;
        self.next[at] = NONE;
        if self.tail == NONE {
            self.head = block;
        } else {
            self.next[self.tail as usize] = block;
        }
        self.tail = block;
        self.len += 1;
    }

    /// The least recently used block.
    pub(super) fn front(&self) -> Option<u32> {
        Some(self.head).filter(|&block| block != NONE)
    }

    /// Removes and returns the least recently used block.
    pub(super) fn pop_front(&mut self) -> Option<u32> {
        let block = self.front()?;
        self.remove(block);
        Some(block)
    }

    /// Removes `block`. It must be in the list.
    pub(super) fn remove(&mut self, block: u32) {
        let (prev, next) = (self.prev[block as usize], self.next[block as usize]);
        if prev == NONE {
            self.head = next;
        } else {
            self.next[prev as usize] = next;
        }
        if next == NONE {
            self.tail = prev;
        } else {
            self.prev[next as usize] = prev;
        }
        self.len -= 1;
    }
}
