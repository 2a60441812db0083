//! What the machine without a GPU computes with: a pool of threads that runs one program in lockstep, and the kernels that
//! such programs are made of. It imports `error` alone.

pub mod attention;
mod elementwise;
mod embed;
pub mod half;
pub mod isa;
pub mod linear;
pub mod memory;
pub mod model;
pub mod pool;
pub mod program;
pub mod quant;
pub mod rows;
mod run;
mod running;
pub mod sample;
mod simd;
mod step;

pub use isa::Isa;
pub use linear::{FloatType, Format, Linear, Matrix, QuantizedRows, Stored};
pub use memory::{Aligned, Shared};
pub use model::{Model, ModelShape};
pub use pool::{Pool, Team};
pub use program::Program;
pub use quant::BlockType;
pub use step::{StepInput, StepSampling};
