//! Storage pools: the trait, its contract, and a module for each kind.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

pub mod contract;
pub mod dir;
mod driver;

pub use dir::DirPool;
pub use driver::*;
