//! Storage pools: the trait, its contract, and a module for each kind.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

pub mod contract;
mod driver;
pub mod files;
mod flush;
mod layers;
pub mod objects;
mod states;
mod sweep;

pub use driver::*;
pub use files::FilePool;
pub use objects::ObjectPool;
