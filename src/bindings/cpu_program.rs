//! The methods of `_core.CpuProgram`: what a step computes with a model's weights, which `lmserve/model/cpu_ops.py` records.

use std::sync::Mutex;

use pyo3::prelude::*;

use super::cpu_classes::{CpuModel, CpuProgram, lock};
use super::cpu_shape::activation;
use crate::cpu::{ConvGate, Model, Program, ScanRule};
use crate::error::{Error, Result};

#[pymethods]
impl CpuProgram {
    #[new]
    fn new(model: Py<CpuModel>) -> Self {
        Self {
            model,
            program: Mutex::default(),
        }
    }

    fn embed(&self, weight: usize, scale: f32) -> Result<usize> {
        self.record(|model, program| model.record_embed(program, weight, scale))
    }

    fn embed_places(&self, weight: usize) -> Result<usize> {
        self.record(|model, program| model.record_embed_places(program, weight))
    }

    /// Begins what is computed after the rows of x were sampled from.
    fn begin_draft(&self, x: usize) -> Result<()> {
        self.record(|model, program| model.record_begin_draft(program, x))
    }

    fn embed_next(&self, weight: usize, scale: f32) -> Result<usize> {
        self.record(|model, program| model.record_embed_next(program, weight, scale))
    }

    fn join(&self, first: usize, second: usize) -> Result<usize> {
        self.record(|model, program| model.record_join(program, first, second))
    }

    /// Ends the recording of a program that guesses, for each row of x the largest of the logits that `head` gives.
    fn draft(&self, x: usize, head: usize) -> Result<()> {
        self.record(|model, program| model.record_draft(program, x, head))
    }

    fn norm(&self, x: usize, weight: usize) -> Result<usize> {
        self.record(|model, program| model.record_norm(program, x, weight))
    }

    fn add_and_norm(
        &self,
        x: usize,
        residual: usize,
        weight: usize,
        scale: f32,
    ) -> Result<(usize, usize)> {
        self.record(|model, program| model.record_add_norm(program, (x, residual), scale, weight))
    }

    fn add(&self, x: usize, residual: usize, scale: f32) -> Result<usize> {
        self.record(|model, program| model.record_add(program, (x, residual), scale))
    }

    fn scale(&self, x: usize, factor: f32) -> Result<usize> {
        self.record(|model, program| model.record_scale(program, x, factor))
    }

    fn linear(&self, x: usize, weight: usize) -> Result<usize> {
        self.record(|model, program| model.record_linear(program, x, weight))
    }

    fn rope_and_cache(
        &self,
        qkv: usize,
        layer: usize,
        norms: (Option<usize>, Option<usize>, Option<usize>),
    ) -> Result<usize> {
        let norms = [norms.0, norms.1, norms.2];
        self.record(|model, program| model.record_rope_and_cache(program, qkv, layer, norms))
    }

    #[pyo3(signature = (queries, layer, sinks=None, distances=None))]
    fn attention(
        &self,
        queries: usize,
        layer: usize,
        sinks: Option<usize>,
        distances: Option<usize>,
    ) -> Result<usize> {
        let given = (sinks, distances);
        self.record(|model, program| model.record_attention(program, queries, layer, given))
    }

    /// An activation: `gated`, of x's first half times the second; or of x, times columns of `factor` from `start` on.
    #[pyo3(signature = (x, name, parameters, *, gated=false, factor=None, start=0))]
    #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)]
    fn activate(
        &self,
        x: usize,
        name: &str,
        parameters: Vec<f32>,
        gated: bool,
        factor: Option<usize>,
        start: usize,
    ) -> Result<usize> {
        let activation = activation(name, &parameters)?;
        let factor = factor.map(|factor| (factor, start));
        self.record(|model, program| model.record_activate(program, x, activation, gated, factor))
    }

    fn heads(&self, x: usize, weight: usize, passed: usize) -> Result<usize> {
        self.record(|model, program| model.record_heads(program, x, weight, passed))
    }

    fn latent_cache(&self, q: usize, kv: usize, layer: usize, norm: usize) -> Result<usize> {
        self.record(|model, program| model.record_latent_cache(program, (q, kv), layer, norm))
    }

    fn route(&self, x: usize, weight: usize) -> Result<usize> {
        self.record(|model, program| model.record_route(program, x, weight))
    }

    fn experts(&self, x: usize, routing: usize, weight: usize) -> Result<usize> {
        self.record(|model, program| model.record_experts(program, (x, routing), weight))
    }

    /// A causal convolution; `gate` is "none", "silu" or "inputs".
    fn conv(&self, x: usize, layer: usize, weight: usize, gate: &str) -> Result<usize> {
        let gate = match gate {
            "none" => ConvGate::None,
            "silu" => ConvGate::Silu,
            "inputs" => ConvGate::Inputs,
            _ => {
                let message = format!("must be none, silu or inputs, but {gate} was given");
                return Err(Error::invalid("gate", message));
            }
        };
        self.record(|model, program| model.record_conv(program, x, layer, weight, gate))
    }

    /// A recurrence; `rule` is "delta", `delta_tiled` or "mamba".
    fn scan(
        &self,
        x: usize,
        gates: usize,
        layer: usize,
        weight: usize,
        rule: &str,
    ) -> Result<usize> {
        let rule = match rule {
            "delta" => ScanRule::Delta { tiled: false },
            "delta_tiled" => ScanRule::Delta { tiled: true },
            "mamba" => ScanRule::Mamba,
            _ => {
                let message = format!("must be delta, delta_tiled or mamba, but {rule} was given");
                return Err(Error::invalid("rule", message));
            }
        };
        self.record(|model, program| model.record_scan(program, (x, gates), layer, weight, rule))
    }

    /// Each row times the sigmoid of its gate, in place.
    fn gate_rows(&self, x: usize, gates: usize) -> Result<usize> {
        self.record(|model, program| model.record_gate_rows(program, x, gates))
    }

    fn rows(&self, x: usize) -> Result<usize> {
        self.record(|model, program| model.record_rows(program, x))
    }

    fn finish(&self, x: usize) -> Result<()> {
        self.record(|model, program| model.record_result(program, x))
    }
}

impl CpuProgram {
    fn record<T>(&self, record: impl FnOnce(&Model, &mut Program) -> Result<T>) -> Result<T> {
        let model = lock(&self.model.get().0);
        record(&model, &mut lock(&self.program))
    }
}
