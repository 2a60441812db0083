//! Embeddings of whole texts by a decoder: the mean of its states over each text. The KV cache of sequences is not touched.

use super::attention::{KvCache, PAGE};
use super::elementwise::pool_mean;
use super::model::Model;
use super::program::Program;
use super::run::StepInput;
use crate::error::Result;

impl Model {
    /// `[n, hidden]`: for each text, `token_ids[cu_seqlens[i]..cu_seqlens[i + 1]]`, the mean over its tokens of what `program`
    /// leaves for them, divided by its length. At most `max_tokens` tokens are computed at once.
    ///
    /// # Errors
    /// As [`Model::run`].
    pub fn embed(
        &mut self,
        program: &Program,
        token_ids: &[i32],
        cu_seqlens: &[i32],
        max_tokens: usize,
    ) -> Result<Vec<f32>> {
        let mut embeddings = Vec::new();
        for bounds in cu_seqlens.windows(2) {
            let tokens = &token_ids[bounds[0] as usize..bounds[1] as usize];
            let block_size = self.shape.block_size;
            let blocks = tokens.len().div_ceil(block_size);
            let mut cache = KvCache::new(
                self.shape.kv,
                self.shape.layers,
                blocks * (block_size / PAGE),
            );
            let table: Vec<i32> = (0..blocks as i32).collect();
            let (mut states, mut width) = (Vec::new(), 0);
            for (at, chunk) in tokens.chunks(max_tokens.max(1)).enumerate() {
                let first = at * max_tokens.max(1);
                let positions: Vec<i32> = (first..first + chunk.len()).map(|p| p as i32).collect();
                let step = StepInput {
                    token_ids: chunk,
                    positions: &positions,
                    slots: &positions,
                    query_start: &[0, chunk.len() as i32],
                    context_lens: &[(first + chunk.len()) as i32],
                    block_tables: &table,
                    stride: table.len(),
                    sample_rows: &[],
                };
                let (value, rows) = self.run_states(program, &step, &mut cache)?;
                width = value.width;
                states.extend_from_slice(&rows[..chunk.len() * width]);
            }
            let start = embeddings.len();
            embeddings.resize(start + width, 0.0);
            pool_mean(&states, &mut embeddings[start..]);
        }
        Ok(embeddings)
    }
}
