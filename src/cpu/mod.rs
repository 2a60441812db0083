//! Computes on machines without a GPU: a pool of threads that run one program in lockstep, and the kernels of which such
//! programs consist. It imports only `error`.

mod activation;
pub mod attention;
mod copies;
mod elementwise;
mod embed;
mod experts;
pub mod half;
mod heads;
pub mod isa;
mod latent;
pub mod linear;
pub mod memory;
pub mod model;
pub mod packed;
pub mod pool;
mod pooling;
pub mod program;
pub mod quant;
pub mod recurrent;
pub mod row_ops;
mod run;
pub mod sample;
mod scratch;
mod simd;
mod step;
mod step_context;

pub use activation::Activation;
pub use elementwise::Norm;
pub use embed::Texts;
pub use experts::{ExpertMatrices, ExpertNumbers, Router};
pub use isa::Isa;
pub use linear::{FloatType, Format, Linear, Matrix, QuantizedRows, Stored};
pub use memory::{Aligned, SharedSlice};
pub use model::{LayerShape, Model, ModelShape, PositionTables};
pub use pool::{Pool, Team};
pub use pooling::Pooling;
pub use program::Program;
pub use quant::BlockType;
pub use recurrent::{ConvGate, RecurrentShape, ScanRule};
pub use step::{StepInput, StepSampling};
