//! Storage pools: the trait, its contract, and a module for each kind.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

mod abilities;
mod chain;
pub mod contract;
mod descriptions;
mod driver;
pub mod files;
mod filling;
mod flush;
mod growth;
mod hold;
mod layers;
mod luks;
mod moved;
pub mod objects;
mod open;
mod places;
mod projects;
mod states;
mod sweep;

pub use descriptions::pool_description;
pub use driver::*;
pub use files::FilePool;
pub use hold::{Hold, hold_by_id};
pub use luks::Container;
pub use objects::ObjectPool;
pub use projects::release_limits;

#[cfg(test)]
#[path = "../../../testkit/src/backends.rs"]
mod backends;
