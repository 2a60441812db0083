//! Holds and frees cached blocks at the request of clients.

use std::collections::HashMap;

use super::chain::{ChainId, Owner};
use super::pool::BlockPool;
use super::shelves::{Shelves, tail_key};

impl BlockPool {
    /// Sets the current time in milliseconds. Holds are compared with it.
    pub fn set_time(&self, now_ms: u64) {
        self.shelves().now_ms = now_ms;
    }

    /// Holds the cached blocks of `tokens` for this many milliseconds. They are evicted only after all blocks without a hold.
    pub fn hold(&self, owner: impl Into<Owner>, tokens: &[u32], hold_ms: u64) {
        let root = self.root(owner);
        self.shelves().hold(root, tokens, hold_ms);
    }

    /// Frees the cached blocks of `tokens` that no other prefix shares. Returns their number.
    pub fn give_up(&self, owner: impl Into<Owner>, tokens: &[u32]) -> usize {
        let root = self.root(owner);
        self.shelves().give_up(root, tokens)
    }
}

impl Shelves {
    /// Makes a cached block evictable, because no table references it any more.
    pub(super) fn list(&mut self, block: u32) {
        let held = self.hold_until[block as usize] > self.now_ms;
        self.in_held[block as usize] = held;
        if held {
            self.held.push_back(block);
        } else {
            self.evictable.push_back(block);
        }
    }

    pub(super) fn unlist(&mut self, block: u32) {
        if self.in_held[block as usize] {
            self.held.remove(block);
        } else {
            self.evictable.remove(block);
        }
    }

    /// The block to evict next: the first block whose hold has ended, else the least recently used block without a hold, else the
    /// first held one.
    pub(super) fn next_to_evict(&self) -> Option<u32> {
        let held = self.held.front();
        held.filter(|&block| self.hold_until[block as usize] <= self.now_ms)
            .or_else(|| self.evictable.front())
            .or(held)
    }

    /// The cached blocks of the longest known prefix of `tokens`, the first one first.
    fn cached_chain(&self, mut chain: ChainId, tokens: &[u32]) -> Vec<u32> {
        let mut blocks = Vec::new();
        for chunk in tokens.chunks_exact(self.block_size) {
            let Some((block, next)) = self.find(chain, chunk) else {
                break;
            };
            blocks.push(block);
            chain = next;
        }
        let rest = &tokens[blocks.len() * self.block_size..];
        let tail = self.index.get(&tail_key(chain));
        blocks.extend(tail.filter(|&&block| {
            self.cached[block as usize].is_some_and(|cached| {
                let at = block as usize * self.block_size;
                cached.parent == chain
                    && cached.chain.is_none()
                    && rest.starts_with(&self.tokens[at..at + cached.len])
            })
        }));
        blocks
    }

    /// Holds the cached blocks of `tokens`. They are evicted only after all blocks without a hold.
    fn hold(&mut self, root: ChainId, tokens: &[u32], hold_ms: u64) {
        let until = self.now_ms.saturating_add(hold_ms);
        // The last block first, so that it is evicted before those in front of it.
        for block in self.cached_chain(root, tokens).into_iter().rev() {
            let at = block as usize;
            self.hold_until[at] = until.max(self.hold_until[at]);
            if self.references[at] == 0 {
                self.unlist(block);
                self.list(block);
            }
        }
    }

    /// Frees the cached blocks of `tokens` that no other prefix shares. Returns their number.
    fn give_up(&mut self, root: ChainId, tokens: &[u32]) -> usize {
        let mut children: HashMap<ChainId, usize> = HashMap::new();
        for cached in self.cached.iter().flatten() {
            *children.entry(cached.parent).or_default() += 1;
        }
        let mut given_up = 0;
        for block in self.cached_chain(root, tokens).into_iter().rev() {
            let Some(cached) = self.cached[block as usize] else {
                break;
            };
            let followed = |chain| children.get(&chain).is_some_and(|&count| count > 0);
            if cached.chain.is_some_and(followed) || self.references[block as usize] > 0 {
                break;
            }
            if let Some(count) = children.get_mut(&cached.parent) {
                *count -= 1;
            }
            self.unlist(block);
            self.forget(block);
            self.set_free(block);
            given_up += 1;
        }
        given_up
    }
}
