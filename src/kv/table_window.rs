//! The window blocks of one sequence: those of its last blocks, as far as the window reaches.

use std::sync::Arc;

use super::table::BlockTable;
use super::window_blocks::TableWindow;

impl BlockTable {
    /// Its window blocks, in a model with layers that have a sliding window.
    pub const fn window(&self) -> Option<&TableWindow> {
        self.window.as_ref()
    }

    /// The slot for the K and V of token `position` in layers with a window, if the model has such layers.
    pub fn window_slot(&self, position: usize) -> Option<usize> {
        let (window, size) = (self.window.as_ref()?, self.pool().block_size());
        let block = window.blocks[position / size - window.first] as usize;
        Some(block * size + position % size)
    }

    /// Releases the window blocks that no token after the first `computed` tokens sees. Those before one of `borders`, which are
    /// lengths of the sequence, remain cached if there is room.
    pub fn slide(&mut self, computed: usize, borders: &[usize]) {
        let (Some(window), Some(next)) = (&self.window, self.pool().first_seen(computed)) else {
            return;
        };
        let (first, size) = (window.first, self.pool().block_size());
        if next <= first {
            return;
        }
        let seen = |border: usize| {
            self.pool()
                .first_seen(border)
                .map(|from| from..border.div_ceil(size))
        };
        let kept: Vec<_> = borders.iter().filter_map(|&border| seen(border)).collect();
        self.pool()
            .let_windows_go(&self.blocks()[first..next], first, |index| {
                kept.iter().any(|border| border.contains(&index))
            });
        self.hold_windows_from(next);
    }

    /// Notes that it holds the window blocks from `first` on.
    pub(super) fn hold_windows_from(&mut self, first: usize) {
        if self.window.is_some() {
            let blocks = Arc::new(self.pool().window_blocks(&self.blocks()[first..]));
            self.window = Some(TableWindow { first, blocks });
        }
    }

    /// Notes the window blocks again after its blocks have changed; the first one is the same.
    pub(super) fn renew_windows(&mut self) {
        if let Some(window) = &self.window {
            self.hold_windows_from(window.first);
        }
    }

    /// The first block whose window block it holds.
    pub(super) fn first_window(&self) -> usize {
        self.window.as_ref().map_or(0, |window| window.first)
    }

    pub(super) fn drop_windows(&mut self) {
        if let Some(window) = self.window.take() {
            let held = &self.blocks()[window.first..];
            self.pool().let_windows_go(held, window.first, |_| true);
        }
    }
}
