//! Virtual machines by QEMU.
//!
//! A machine is q35 with a versioned type and fixed addresses. QEMU is a child of its keeper, runs as a user of its own
//! without capabilities, and inherits everything it uses as descriptors. One task owns one machine and speaks QMP; the
//! guest's agents (Karst's own, else QEMU's) give programs and files.

// Deals with the real world: time and tasks are the runtime's.
#![allow(clippy::disallowed_methods)]

pub mod agent;
pub mod argv;
mod backups;
mod bitmaps;
mod board;
mod copies;
pub mod cpu;
mod details;
pub mod devices;
pub mod directories;
mod display;
mod driver;
pub mod exec;
mod figures;
pub mod files;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod given;
mod inside;
mod keys;
mod launch;
mod layers;
pub mod line;
mod machine;
mod memory_files;
mod monitor;
mod news;
mod owners;
mod placement;
mod plug;
mod ports;
pub mod probe;
pub mod qmp;
mod record;
mod resize;
mod sampling;
mod saved;
pub mod seed;
mod share;
mod states;
mod still;
mod threads;
mod threshold;
mod tpm;
pub mod virtiofs;

pub use driver::{QemuDriver, QemuOptions};
pub use probe::{HostVirtualization, probe};

#[cfg(test)]
#[path = "../../../testkit/src/backends.rs"]
mod backends;
