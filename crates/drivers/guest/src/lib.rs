//! What every guest driver is: the trait, the resolved specification it takes, and the keeper's client.
//!
//! Drivers know no store, operation or API type. The agent resolved every id: a disk is a path that exists, a NIC an
//! interface that exists, an id range one that is recorded.
#![allow(clippy::disallowed_methods)] // drivers live in the real world

#[cfg(feature = "testing")]
pub mod contract;
pub mod driver;
pub mod keeper;
pub mod packet;
pub mod record;
pub mod resolved;
#[cfg(feature = "testing")]
pub mod samples;
pub mod silence;

pub use driver::*;
pub use resolved::*;
pub use silence::Silence;
