//! Computes on machines without a GPU: a pool of threads that run one program in lockstep, and the kernels of which such
//! programs consist. It imports only `error`.

mod activation;
mod architecture;
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
mod op;
pub mod packed;
pub mod pool;
mod pooling;
pub mod program;
pub mod quant;
mod record;
pub mod recurrent;
pub mod row_ops;
mod run;
pub mod sample;
mod scratch;
mod simd;
mod step;
mod step_context;

pub use activation::Activation;
pub use architecture::{LayerShape, ModelShape, PositionTables};
pub use elementwise::Norm;
pub use embed::{EmbedPasses, Texts};
pub use experts::{ExpertMatrices, ExpertNumbers, Router};
pub use isa::Isa;
pub use linear::{FloatType, Format, Linear, Matrix, QuantizedRows, Stored};
pub use memory::{Aligned, SharedSlice};
pub use model::Model;
pub use pool::{Pool, Team};
pub use pooling::Pooling;
pub use program::Program;
pub use quant::BlockType;
pub use recurrent::{ConvGate, RecurrentShape, ScanRule};
pub use step::{StepInput, StepSampling};
