//! Test tools: a whole platform in one seeded world, the clean slate, and the harness that walks over every saga.
#![allow(clippy::disallowed_methods)] // a test tool

pub mod backends;
pub mod harness;
pub mod scenarios;
pub mod servers;
pub mod world;

pub use world::World;
