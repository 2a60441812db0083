//! What the machine without a GPU computes with: a pool of threads that runs one program in lockstep, and the kernels that
//! such programs are made of. It imports `error` alone.

pub mod attention;
mod elementwise;
pub mod half;
pub mod isa;
pub mod linear;
pub mod memory;
pub mod pool;
pub mod quant;
pub mod rows;
mod simd;

pub use isa::Isa;
pub use linear::{Format, Linear, QuantizedRows, Source};
pub use memory::{Aligned, Shared};
pub use pool::{Pool, Team};
pub use quant::BlockType;
