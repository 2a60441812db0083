//! The window blocks of one sequence: those of its last blocks, as far as a window reaches.

use std::sync::Arc;

use super::table::BlockTable;
use super::window_blocks::TableWindow;

impl BlockTable {
    /// Its window blocks, in a model with layers that have a window.
    pub const fn window(&self) -> Option<&TableWindow> {
        self.window.as_ref()
    }

    /// Where the K and V of token `position` go in layers with a window, if the model has some.
    pub fn window_slot(&self, position: usize) -> Option<usize> {
        let (window, size) = (self.window.as_ref()?, self.pool().block_size());
        let block = window.blocks[position / size - window.first] as usize;
        Some(block * size + position % size)
    }

    /// Gives up the window blocks that nothing behind the first `computed` tokens sees. Those before one of `borders`, lengths of the
    /// sequence, are kept for others if there is room.
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

    /// Notes which window blocks it holds: those from `first` on.
    pub(super) fn hold_windows_from(&mut self, first: usize) {
        if self.window.is_some() {
            let blocks = Arc::new(self.pool().window_blocks(&self.blocks()[first..]));
            self.window = Some(TableWindow { first, blocks });
        }
    }

    /// Its blocks have changed; those from the same one on are held.
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
